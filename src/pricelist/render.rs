//! Listings as the `[[models]]` of a configuration.

use std::fmt::Write as _;

use crate::formats::json::quote;
use crate::pricelist::Listing;
use crate::pricing::{ModelKind, Unit, UnitPrices};

/// A table of `farebox.toml`, as people write it. Its provider must be configured beside it.
pub fn to_toml(listing: &Listing) -> String {
    let mut out = String::from("[[models]]\n");
    let mut line = |key: &str, value: String| {
        let _ = writeln!(out, "{key} = {value}");
    };
    // The escapes of a JSON string are escapes of a TOML string.
    line("id", quote(&listing.id()));
    if listing.kind != ModelKind::Chat {
        line("kind", quote(listing.kind.as_str()));
    }
    line("provider", quote(&listing.provider));
    line("upstream_model", quote(&listing.name));
    if listing.context_length > 0 {
        line("context_length", listing.context_length.to_string());
    }
    if listing.max_output_tokens > 0 && listing.kind != ModelKind::Embedding {
        line("max_output_tokens", listing.max_output_tokens.to_string());
    }
    let mut price = rates(listing.prices.rates());
    let tiers = listing.prices.tiers().iter();
    let tiers: Vec<_> =
        tiers.map(|tier| format!("{{ above = {}, {} }}", tier.above, rates(&tier.rates))).collect();
    if !tiers.is_empty() {
        let _ = write!(price, ", tiers = [{}]", tiers.join(", "));
    }
    line("price", format!("{{ {price} }}"));
    out
}

fn rates(rates: &UnitPrices) -> String {
    let text = |(unit, price): (Unit, crate::money::UnitPrice)| {
        format!("{} = \"{}\"", unit.config_key(), price.to_usd_per(unit.per()))
    };
    rates.iter().map(text).collect::<Vec<_>>().join(", ")
}
