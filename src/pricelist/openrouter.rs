//! OpenRouter's `/api/v1/models`. USD for one, as strings.

use crate::formats::json::Object;
use crate::pricelist::{Draft, PriceList, object, string, tokens};
use crate::pricing::{ModelKind, Unit};

const UNITS: &[(&str, Unit)] = &[
    ("prompt", Unit::Prompt),
    ("completion", Unit::Completion),
    ("internal_reasoning", Unit::Reasoning),
    ("input_cache_read", Unit::CachedPrompt),
    ("input_cache_write", Unit::CacheWrite),
    ("input_cache_write_1h", Unit::CacheWrite1h),
    ("audio", Unit::AudioIn),
    ("input_audio_cache", Unit::CachedAudio),
    ("audio_output", Unit::AudioOut),
    ("image_token", Unit::ImageIn),
    ("image_output", Unit::ImageOut),
    ("request", Unit::Call),
    ("web_search", Unit::Search),
];

/// What says for whom a price is, beside the prices of an override.
const FROM_TOKENS: &str = "min_prompt_tokens";

pub fn read(list: &Object<'_>, into: &mut PriceList) {
    let models: Vec<Object<'_>> =
        list.get("data").and_then(|data| serde_json::from_str(data).ok()).unwrap_or_default();
    for model in &models {
        let id = string(model, "id").unwrap_or_default();
        match draft(&id, model) {
            Ok(draft) => into.take(&id, draft),
            Err(why) => into.leave_out(&id, why),
        }
    }
}

fn draft(id: &str, model: &Object<'_>) -> Result<Draft, String> {
    let makes = object(model, "architecture")
        .and_then(|of| serde_json::from_str::<Vec<String>>(of.get("output_modalities")?).ok());
    if makes.is_some_and(|makes| !makes.iter().any(|kind| kind == "text")) {
        return Err("makes no text".into());
    }
    let Some(pricing) = object(model, "pricing") else { return Err("has no prices".into()) };
    let top = object(model, "top_provider");
    let of_top = |key| top.as_ref().and_then(|top| tokens(top, key));
    let context = tokens(model, "context_length").or_else(|| of_top("context_length")).unwrap_or(0);
    // Where they name no limit, an answer may fill the context.
    let limits = (context, of_top("max_completion_tokens").unwrap_or(context));
    let mut draft = Draft::new("openrouter", id, ModelKind::Chat, limits);
    for (key, value) in pricing.members().filter(|(_, value)| *value != "null") {
        match key {
            "overrides" => read_overrides(&mut draft, value),
            _ => read_rate(&mut draft, key, value, None),
        }
    }
    Ok(draft)
}

/// Other prices from so many tokens on. Those for times of the day have no place here.
fn read_overrides(draft: &mut Draft, value: &str) {
    let overrides: Vec<Object<'_>> = serde_json::from_str(value).unwrap_or_default();
    for rates in &overrides {
        let is_rate = |key: &str| UNITS.iter().any(|(name, _)| *name == key);
        let is_by_length =
            rates.members().all(|(key, value)| key == FROM_TOKENS || is_rate(key) || value == "null");
        match tokens(rates, FROM_TOKENS).filter(|_| is_by_length) {
            Some(from) => {
                for (key, value) in
                    rates.members().filter(|(key, value)| *key != FROM_TOKENS && *value != "null")
                {
                    read_rate(draft, key, value, Some(from.saturating_sub(1)));
                }
            }
            None => draft.not_mapped.push("overrides (by time)".into()),
        }
    }
}

fn read_rate(draft: &mut Draft, key: &str, value: &str, above: Option<u64>) {
    match UNITS.iter().find(|(name, _)| *name == key) {
        // They write zero for what does not apply, also where it would make free what is a part of another.
        Some((_, unit)) if is_zero(value) && !matches!(unit, Unit::Prompt | Unit::Completion) => {}
        Some((_, unit)) => {
            draft.price(key, *unit, if *unit == Unit::Millisecond { 1000 } else { 1 }, above, value)
        }
        None if is_zero(value) => {}
        None => draft.not_mapped.push(key.to_owned()),
    }
}

fn is_zero(value: &str) -> bool {
    crate::money::parse_decimal(value.trim_matches('"'), 12) == Ok((0, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::UnitPrice;

    #[test]
    fn a_model_becomes_an_offer() {
        let list = PriceList::read(
            None,
            r#"{"data":[
              {"id":"anthropic/claude","context_length":200000,"top_provider":{"max_completion_tokens":64000},
               "pricing":{"prompt":"0.000003","completion":"0.000015","request":"0","image":"0.0048","web_search":"0.01",
               "internal_reasoning":"0","input_cache_read":"0.0000003","discount":0,
               "overrides":[{"min_prompt_tokens":200000,"prompt":"0.000006"},{"utc_start":1,"prompt":"0.000001"}]}},
              {"id":"openrouter/auto","context_length":2000000,"pricing":{"prompt":"-1","completion":"-1"}}]}"#,
        )
        .unwrap();
        let [claude] = &list.listings[..] else { panic!("{list:?}") };
        assert_eq!(claude.id(), "openrouter/anthropic/claude");
        let listed = |unit| claude.prices.rates().listed(unit).map(UnitPrice::get);
        assert_eq!((listed(Unit::Prompt), listed(Unit::CachedPrompt)), (Some(3_000_000), Some(300_000)));
        assert_eq!((listed(Unit::Reasoning), listed(Unit::Call)), (None, None), "a zero there is no price");
        assert_eq!(claude.prices.at(199_999).charged(Unit::Prompt), UnitPrice::new(3_000_000));
        assert_eq!(claude.prices.at(200_000).charged(Unit::Prompt), UnitPrice::new(6_000_000));
        let not_mapped: Vec<_> = list.not_mapped.keys().map(String::as_str).collect();
        assert_eq!(not_mapped, ["image", "overrides (by time)"]);
        assert_eq!(list.left_out.len(), 1, "{:?}", list.left_out);
    }
}
