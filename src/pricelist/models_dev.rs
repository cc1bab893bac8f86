//! models.dev's `api.json`: providers, each with its models. USD per million tokens.

use crate::formats::json::Object;
use crate::pricelist::{Draft, PriceList, object, string, tokens};
use crate::pricing::{ModelKind, Unit};

const UNITS: &[(&str, Unit)] = &[
    ("input", Unit::Prompt),
    ("output", Unit::Completion),
    ("reasoning", Unit::Reasoning),
    ("cache_read", Unit::CachedPrompt),
    ("cache_write", Unit::CacheWrite),
    ("input_audio", Unit::AudioIn),
    ("output_audio", Unit::AudioOut),
];

pub fn read(list: &Object<'_>, into: &mut PriceList) {
    for (key, value) in list.members() {
        let provider = Object::parse(value.as_bytes()).ok();
        let models = provider.as_ref().and_then(|provider| object(provider, "models"));
        let Some(models) = models else {
            into.leave_out(key, "has no models".into());
            continue;
        };
        for (name, value) in models.members() {
            let id = format!("{key}/{name}");
            match Object::parse(value.as_bytes()) {
                Ok(model) => match draft(key, name, &model) {
                    Ok(draft) => into.take(&id, draft),
                    Err(why) => into.leave_out(&id, why),
                },
                Err(_) => into.leave_out(&id, "is no object".into()),
            }
        }
    }
}

fn draft(provider: &str, name: &str, model: &Object<'_>) -> Result<Draft, String> {
    let makes = object(model, "modalities")
        .and_then(|modalities| serde_json::from_str::<Vec<String>>(modalities.get("output")?).ok());
    // What else it may make beside text is not told apart by these prices.
    if makes.is_some_and(|makes| !makes.iter().any(|kind| kind == "text")) {
        return Err("makes no text".into());
    }
    let limit = object(model, "limit");
    let limit = |key| limit.as_ref().and_then(|limit| tokens(limit, key)).unwrap_or(0);
    let limits = (limit("context"), limit("output"));
    let mut draft = Draft::new(provider, name, ModelKind::Chat, limits);
    let Some(cost) = object(model, "cost") else { return Err("has no prices".into()) };
    let has_tiers = cost.get_non_null("tiers").is_some();
    for (key, value) in cost.members() {
        match key {
            "tiers" => read_tiers(&mut draft, value),
            // Its dearer twin with a length of its own says more: of 256,000 it says 200,000 too.
            "context_over_200k" if has_tiers => {}
            "context_over_200k" => match Object::parse(value.as_bytes()) {
                Ok(rates) => read_rates(&mut draft, &rates, Some(200_000), &[]),
                Err(_) => draft.not_mapped.push(key.into()),
            },
            _ => read_rate(&mut draft, key, value, None),
        }
    }
    Ok(draft)
}

fn read_tiers(draft: &mut Draft, value: &str) {
    let tiers: Vec<Object<'_>> = serde_json::from_str(value).unwrap_or_default();
    for tier in &tiers {
        let of = object(tier, "tier");
        let is_context = of.as_ref().and_then(|of| string(of, "type")).as_deref() == Some("context");
        match of.and_then(|of| tokens(&of, "size")).filter(|_| is_context) {
            Some(above) => read_rates(draft, tier, Some(above), &["tier"]),
            None => draft.not_mapped.push("tiers".into()),
        }
    }
}

fn read_rates(draft: &mut Draft, rates: &Object<'_>, above: Option<u64>, but: &[&str]) {
    for (key, value) in rates.members().filter(|(key, _)| !but.contains(key)) {
        read_rate(draft, key, value, above);
    }
}

fn read_rate(draft: &mut Draft, key: &str, value: &str, above: Option<u64>) {
    match UNITS.iter().find(|(name, _)| *name == key) {
        _ if value == "null" => {}
        Some((_, unit)) => draft.price(key, *unit, unit.per(), above, value),
        None => draft.not_mapped.push(key.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::UnitPrice;

    #[test]
    fn a_model_becomes_an_offer() {
        let list = PriceList::read(
            None,
            r#"{"openai":{"id":"openai","models":{
              "gpt-5.4":{"id":"gpt-5.4","limit":{"context":400000,"output":128000},"modalities":{"output":["text"]},
                "cost":{"input":2.5,"output":15,"cache_read":0.25,"context_over_200k":{"input":5,"output":22.5},
                "tiers":[{"input":5,"output":22.5,"cache_read":0.5,"tier":{"type":"context","size":272000}}],"smell":1}},
              "old":{"id":"old","limit":{"context":1,"output":1},"cost":{"input":1,"output":2,"context_over_200k":{"input":3}}},
              "song":{"id":"song","modalities":{"output":["audio"]},"cost":{"input":1}},
              "free":{"id":"free","limit":{"context":1,"output":1}}}},"empty":{}}"#,
        )
        .unwrap();
        let [new, old] = &list.listings[..] else { panic!("{list:?}") };
        assert_eq!(new.id(), "openai/gpt-5.4");
        assert_eq!(new.prices.rates().listed(Unit::CachedPrompt), Some(UnitPrice::new(250_000)));
        assert_eq!(new.prices.at(272_000).charged(Unit::Prompt), UnitPrice::new(2_500_000));
        assert_eq!(new.prices.at(272_001).charged(Unit::Completion), UnitPrice::new(22_500_000));
        assert_eq!(old.prices.at(200_001).charged(Unit::Prompt), UnitPrice::new(3_000_000));
        assert_eq!(list.not_mapped.get("smell"), Some(&1));
        assert_eq!(list.left_out.len(), 3, "{:?}", list.left_out);
    }
}
