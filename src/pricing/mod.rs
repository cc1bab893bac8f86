//! What things cost: offers and their prices, usage, quotes and charges. Pure: no I/O, no time.

pub mod catalog;
pub mod charge;
pub mod prices;
pub mod unit;
pub mod usage;

pub use catalog::{Catalog, ImageTokens, LiveCatalog, ModelKind, Offer, Reasoning};
pub use charge::{Charge, Most, Quote, Terms, quote};
pub use prices::{ImagePrice, PriceVersion, Prices, Tier, UnitPrices};
pub use unit::{Unit, Units};
pub use usage::{AnthropicUsage, Dialect, Reported, Usage};
