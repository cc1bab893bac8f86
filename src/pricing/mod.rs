//! What things cost: offers and their prices, usage, quotes and charges. Pure: no I/O, no time.

pub mod catalog;
pub mod charge;
pub mod usage;

pub use catalog::{Catalog, Offer, Reasoning};
pub use charge::{Charge, Prices, Quote, Terms, quote};
pub use usage::Usage;
