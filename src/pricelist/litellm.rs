//! LiteLLM's `model_prices_and_context_window.json`.

use crate::formats::json::Object;
use crate::pricelist::{Draft, PriceList, string, tokens};
use crate::pricing::{ModelKind, Unit};

/// What they call a unit, where one price says all. Before each comes what it counts as elsewhere too.
const UNITS: &[(&str, Unit)] = &[
    ("input_cost_per_token", Unit::Prompt),
    ("output_cost_per_token", Unit::Completion),
    ("cache_read_input_token_cost", Unit::CachedPrompt),
    ("cache_creation_input_token_cost", Unit::CacheWrite),
    ("cache_creation_input_token_cost_above_1hr", Unit::CacheWrite1h),
    ("input_cost_per_audio_token", Unit::AudioIn),
    ("cache_read_input_audio_token_cost", Unit::CachedAudio),
    ("input_cost_per_image_token", Unit::ImageIn),
    ("cache_read_input_image_token_cost", Unit::CachedImage),
    ("output_cost_per_reasoning_token", Unit::Reasoning),
    ("output_cost_per_audio_token", Unit::AudioOut),
    ("output_cost_per_image_token", Unit::ImageOut),
    ("input_cost_per_audio_per_second", Unit::Millisecond),
    ("input_cost_per_request", Unit::Call),
];

/// Whose entries charge the higher price from the threshold on, not above it: LiteLLM's own calculator says so.
const AT_THRESHOLD: &str = "xai";

pub fn read(list: &Object<'_>, into: &mut PriceList) {
    for (key, value) in list.members() {
        // A description of the format, and rules for names, are among the models.
        if key == "sample_spec" || key == "fallback_generalizations" {
            continue;
        }
        let Ok(entry) = Object::parse(value.as_bytes()) else {
            into.leave_out(key, "is no object".into());
            continue;
        };
        // Another name for an entry has its prices.
        let other =
            string(&entry, "alias_of").and_then(|other| Object::parse(list.get(&other)?.as_bytes()).ok());
        match draft(key, other.as_ref().unwrap_or(&entry)) {
            Ok(draft) => into.take(key, draft),
            Err(why) => into.leave_out(key, why),
        }
    }
}

/// Whether a name has the size of a picture in it, as `hd/1024-x-1024/dall-e-3`: no provider knows such a model.
fn has_size(name: &str) -> bool {
    name.split('/').any(|part| {
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        part.split_once("-x-").is_some_and(|(width, height)| is_number(width) && is_number(height))
    })
}

fn draft(key: &str, entry: &Object<'_>) -> Result<Draft, String> {
    let mode = string(entry, "mode");
    let kind = match mode.as_deref() {
        Some("chat" | "responses") => ModelKind::Chat,
        Some("embedding") => ModelKind::Embedding,
        Some("image_generation") => ModelKind::Image,
        Some("audio_speech") => ModelKind::Speech,
        Some("audio_transcription") => ModelKind::Transcription,
        Some(other) => return Err(format!("is for {other}")),
        None => return Err("does not say what it is for".into()),
    };
    if has_size(key) {
        return Err("is a size of a picture".into());
    }
    let provider = string(entry, "litellm_provider").unwrap_or_default();
    let name = key.strip_prefix(&format!("{provider}/")).unwrap_or(key);
    let limit = |key| tokens(entry, key).unwrap_or(0);
    let either = |a, b| if a == 0 { b } else { a };
    let most = limit("max_tokens");
    let limits = (either(limit("max_input_tokens"), most), either(limit("max_output_tokens"), most));
    let mut draft = Draft::new(&provider, name, kind, limits);
    for (key, value) in entry.members() {
        if is_price(key) && value != "null" {
            read_price(&mut draft, entry, key, value);
        }
    }
    Ok(draft)
}

/// Whether a member says something of what is to be paid. They name it by one of these words.
fn is_price(key: &str) -> bool {
    ["cost", "pric", "multiplier", "provider_specific_entry", "free_requests", "billing_unit"]
        .iter()
        .any(|word| key.contains(word))
}

fn read_price(draft: &mut Draft, entry: &Object<'_>, key: &str, value: &str) {
    let (base, above) = match threshold(key) {
        Some((base, above)) if draft.listing.provider == AT_THRESHOLD => {
            (base, Some(above.saturating_sub(1)))
        }
        Some((base, above)) => (base, Some(above)),
        None => (key.to_owned(), None),
    };
    if let Some((_, unit)) = UNITS.iter().find(|(name, _)| *name == base) {
        // Of an embedding there is no output, and they write that it is free.
        let is_nothing = draft.listing.kind == ModelKind::Embedding && unit.is_completion();
        if !is_nothing {
            draft.price(key, *unit, per(*unit), above, value);
        }
        return;
    }
    let has = |other: &str| entry.get_non_null(other).is_some();
    match (draft.listing.kind, key) {
        (_, "tiered_pricing") => read_tiers(draft, value),
        (_, "search_context_cost_per_query") => read_search(draft, key, value),
        // Where it repeats another price it says nothing new.
        (_, "input_cost_per_token_cache_hit") if entry.get("cache_read_input_token_cost") == Some(value) => {}
        (_, "input_cost_per_token_cache_hit") if !has("cache_read_input_token_cost") => {
            draft.price(key, Unit::CachedPrompt, 1, None, value);
        }
        (_, "citation_cost_per_token") if entry.get("input_cost_per_token") == Some(value) => {}
        (ModelKind::Image, "output_cost_per_image") => draft.price(key, Unit::Image, 1, None, value),
        (ModelKind::Image, "input_cost_per_image") if !has("output_cost_per_image") => {
            draft.price(key, Unit::Image, 1, None, value);
        }
        // One of the two is the price of a second: their calculator takes the output's, if it is above zero.
        (ModelKind::Transcription, "input_cost_per_second")
            if !is_above_zero(entry, "output_cost_per_second") =>
        {
            draft.price(key, Unit::Millisecond, 1000, None, value);
        }
        (ModelKind::Transcription, "output_cost_per_second") if is_above_zero(entry, key) => {
            draft.price(key, Unit::Millisecond, 1000, None, value);
        }
        // Tokens of sound or seconds of it: what is reported is one of them.
        (ModelKind::Speech, "output_cost_per_second")
            if is_above_zero(entry, key) && !has("output_cost_per_audio_token") =>
        {
            draft.price(key, Unit::Millisecond, 1000, None, value);
        }
        (ModelKind::Speech, "input_cost_per_character") => draft.price(key, Unit::Character, 1, None, value),
        _ if is_zero(value) => {}
        _ => draft.not_mapped.push(key.to_owned()),
    }
}

/// `x_above_200k_tokens`, as `x` and 200,000. What stands behind it is another service's price.
fn threshold(key: &str) -> Option<(String, u64)> {
    let (base, rest) = key.rsplit_once("_above_")?;
    let number = rest.strip_suffix("_tokens")?;
    let (number, factor) = match number.strip_suffix('k') {
        Some(thousands) => (thousands, 1000),
        None => (number, 1),
    };
    Some((base.to_owned(), number.parse::<u64>().ok()?.checked_mul(factor)?))
}

/// Prices by length as a list of ranges, of which the first begins at zero. Each stands for itself: what one does
/// not list is not as in the one before.
fn read_tiers(draft: &mut Draft, value: &str) {
    let Ok(tiers) = serde_json::from_str::<Vec<Object<'_>>>(value) else {
        return draft.not_mapped.push("tiered_pricing".into());
    };
    for tier in &tiers {
        let range = tier
            .get("range")
            .and_then(|range| serde_json::from_str::<Vec<&serde_json::value::RawValue>>(range).ok());
        let from = range.and_then(|range| {
            let (from, has_rest) = crate::money::parse_decimal(range.first()?.get(), 0).ok()?;
            u64::try_from(from).ok().filter(|_| !has_rest)
        });
        let Some(from) = from else {
            draft.not_mapped.push("tiered_pricing".into());
            continue;
        };
        let above = (from > 0).then_some(from);
        for (key, value) in tier.members().filter(|(key, _)| *key != "range") {
            match UNITS.iter().find(|(name, _)| *name == key) {
                Some((_, unit)) => draft.price(key, *unit, per(*unit), above, value),
                None => draft.not_mapped.push(format!("tiered_pricing.{key}")),
            }
        }
        if let (Some(_), None, Some(prompt)) =
            (above, tier.get("cache_read_input_token_cost"), tier.get("input_cost_per_token"))
            && draft.rates.listed(Unit::CachedPrompt).is_some()
        {
            draft.price("input_cost_per_token", Unit::CachedPrompt, 1, above, prompt);
        }
    }
}

/// A search, or three prices by how much of what is found is read. There is one here.
fn read_search(draft: &mut Draft, key: &str, value: &str) {
    let Ok(sizes) = Object::parse(value.as_bytes()) else {
        return draft.price(key, Unit::Search, 1, None, value);
    };
    let mut prices: Vec<_> = sizes.members().map(|(_, price)| price).collect();
    prices.dedup();
    match prices[..] {
        [price] => draft.price(key, Unit::Search, 1, None, price),
        _ => draft.not_mapped.push(format!("{key} (by size)")),
    }
}

/// How many of a unit their price is for: theirs of sound is for a second.
fn per(unit: Unit) -> u32 {
    if unit == Unit::Millisecond { 1000 } else { 1 }
}

fn is_above_zero(entry: &Object<'_>, key: &str) -> bool {
    entry.get_non_null(key).is_some_and(|value| !is_zero(value))
}

fn is_zero(value: &str) -> bool {
    crate::money::parse_decimal(value, 12) == Ok((0, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::UnitPrice;
    use crate::pricelist::Source;

    fn read(text: &str) -> PriceList {
        PriceList::read(Some(Source::LiteLlm), text).unwrap()
    }

    #[test]
    fn an_entry_becomes_an_offer() {
        let list = read(
            r#"{"sample_spec":{"mode":"one of"},
            "gemini/pro":{"litellm_provider":"gemini","mode":"chat","max_input_tokens":1048576,"max_output_tokens":65536.0,
              "input_cost_per_token":1.25e-06,"output_cost_per_token":1e-05,"cache_read_input_token_cost":1.25e-07,
              "input_cost_per_token_above_200k_tokens":2.5e-06,"cache_creation_input_token_cost_above_1hr":6e-06,
              "cache_creation_input_token_cost_above_1hr_above_200k_tokens":0.000012,
              "input_cost_per_token_batches":6e-07,"input_cost_per_token_above_200k_tokens_priority":9e-6,
              "search_context_cost_per_query":{"low":0.035,"medium":0.035,"high":0.035},"supports_vision":true}}"#,
        );
        let [listing] = &list.listings[..] else { panic!("{list:?}") };
        assert_eq!((listing.id().as_str(), listing.kind), ("gemini/pro", ModelKind::Chat));
        assert_eq!((listing.context_length, listing.max_output_tokens), (1_048_576, 65_536));
        let listed = |unit| listing.prices.rates().listed(unit).map(UnitPrice::get);
        assert_eq!(listed(Unit::Prompt), Some(1_250_000));
        assert_eq!(listed(Unit::CachedPrompt), Some(125_000));
        assert_eq!(listed(Unit::CacheWrite1h), Some(6_000_000));
        assert_eq!(listed(Unit::Search), Some(35_000_000_000));
        let high = listing.prices.at(200_001);
        assert_eq!(high.listed(Unit::Prompt), Some(UnitPrice::new(2_500_000)));
        assert_eq!(high.listed(Unit::CacheWrite1h), Some(UnitPrice::new(12_000_000)));
        assert_eq!(high.listed(Unit::Completion), Some(UnitPrice::new(10_000_000)));
        let not_mapped: Vec<_> = list.not_mapped.keys().map(String::as_str).collect();
        assert_eq!(
            not_mapped,
            ["input_cost_per_token_above_200k_tokens_priority", "input_cost_per_token_batches"]
        );
        assert!(list.left_out.is_empty(), "{list:?}");
    }

    #[test]
    fn what_cannot_be_told_exactly_is_left_out_by_name() {
        let chat = |members: &str| {
            format!(
                r#"{{"litellm_provider":"p","mode":"chat","max_tokens":10,"output_cost_per_token":1e-6,{members}}}"#
            )
        };
        let text = format!(
            r#"{{"a":{},"b":{},"c":{},"d":{{"mode":"rerank"}},"e":{{"litellm_provider":"p"}},"f":7,"g":{},"h":{},"p/good":{}}}"#,
            chat(r#""input_cost_per_token":1.5e-13"#),
            chat(r#""input_cost_per_token":-1e-6"#),
            chat(r#""input_cost_per_token":"free""#),
            chat(r#""input_dbu_cost_per_token":1e-6"#),
            r#"{"litellm_provider":"p","mode":"chat","input_cost_per_token":1e-6,"output_cost_per_token":1e-6}"#,
            chat(r#""input_cost_per_token":"1e-6""#),
        );
        let list = read(&text);
        assert_eq!(list.listings.len(), 1);
        assert_eq!(list.listings[0].id(), "p/good");
        let left_out: Vec<_> =
            list.left_out.iter().map(|(why, models)| format!("{}: {why}", models.join(","))).collect();
        assert_eq!(
            left_out,
            [
                "e: does not say what it is for",
                "g: has no prompt price for a chat model",
                "b: input_cost_per_token is below zero or too large",
                "a: input_cost_per_token is finer than a pico-USD for one",
                "c: input_cost_per_token is no number",
                "d: is for rerank",
                "f: is no object",
                "h: says nothing of its context's length",
            ]
        );
        assert_eq!(list.not_mapped.get("input_dbu_cost_per_token"), Some(&1));
    }

    #[test]
    fn another_name_has_the_same_prices_and_a_size_is_no_model() {
        let list = read(
            r#"{"p/latest":{"alias_of":"p/m-7"},"p/lost":{"alias_of":"p/m-8"},
              "p/m-7":{"litellm_provider":"p","mode":"embedding","max_tokens":10,"input_cost_per_token":1e-6},
              "hd/1024-x-1024/dall-e-3":{"litellm_provider":"p","mode":"image_generation","input_cost_per_image":0.08}}"#,
        );
        let ids: Vec<_> = list.listings.iter().map(|listing| listing.id()).collect();
        assert_eq!(ids, ["p/latest", "p/m-7"]);
        assert_eq!(list.listings[0].prices, list.listings[1].prices);
        let left_out: Vec<_> =
            list.left_out.iter().map(|(why, models)| format!("{}: {why}", models.join(","))).collect();
        assert_eq!(
            left_out,
            ["p/lost: does not say what it is for", "hd/1024-x-1024/dall-e-3: is a size of a picture"]
        );
    }

    #[test]
    fn of_two_entries_the_one_that_names_its_provider_counts() {
        let entry = |price: &str| {
            format!(
                r#"{{"litellm_provider":"p","mode":"embedding","max_tokens":10,"input_cost_per_token":{price}}}"#
            )
        };
        for text in [
            format!(r#"{{"m":{},"p/m":{}}}"#, entry("1e-6"), entry("2e-6")),
            format!(r#"{{"p/m":{},"m":{}}}"#, entry("2e-6"), entry("1e-6")),
        ] {
            let list = read(&text);
            assert_eq!(list.listings.len(), 1);
            assert_eq!(list.listings[0].prices.charged(Unit::Prompt), UnitPrice::new(2_000_000));
            assert_eq!(list.left_out.values().flatten().collect::<Vec<_>>(), ["m"]);
        }
    }

    #[test]
    fn ranges_are_tiers_and_each_stands_for_itself() {
        let list = read(
            r#"{"q":{"litellm_provider":"p","mode":"chat","max_tokens":10,"tiered_pricing":[
              {"range":[0,256000.0],"input_cost_per_token":4e-7,"output_cost_per_token":1e-6,"cache_read_input_token_cost":1e-7},
              {"range":[256000.0,1e6],"input_cost_per_token":1.2e-6,"output_cost_per_token":3e-6}]}}"#,
        );
        let prices = &list.listings[0].prices;
        assert_eq!(prices.at(256_000).charged(Unit::CachedPrompt), UnitPrice::new(100_000));
        assert_eq!(prices.at(256_001).charged(Unit::CachedPrompt), UnitPrice::new(1_200_000));
        assert_eq!(prices.at(256_001).charged(Unit::Completion), UnitPrice::new(3_000_000));
    }

    #[test]
    fn pictures_and_sound_have_their_own_units() {
        let list = read(
            r#"{"whisper":{"litellm_provider":"p","mode":"audio_transcription","input_cost_per_second":1e-4,"output_cost_per_second":0.0},
              "tts":{"litellm_provider":"p","mode":"audio_speech","input_cost_per_character":1.5e-5},
              "draw":{"litellm_provider":"p","mode":"image_generation","output_cost_per_image":0.039,"input_cost_per_pixel":1e-8},
              "voice":{"litellm_provider":"xai","mode":"chat","max_tokens":9,"input_cost_per_token":1e-6,"output_cost_per_token":1e-6,
                "input_cost_per_audio_per_second":2e-5,"input_cost_per_token_above_200k_tokens":2e-6}}"#,
        );
        let listed =
            |model: usize, unit| list.listings[model].prices.rates().listed(unit).map(UnitPrice::get);
        assert_eq!(listed(0, Unit::Millisecond), Some(100_000));
        assert_eq!(listed(1, Unit::Character), Some(15_000_000));
        assert_eq!(listed(2, Unit::Image), Some(39_000_000_000));
        assert_eq!(listed(3, Unit::Millisecond), Some(20_000));
        assert_eq!(list.not_mapped.get("input_cost_per_pixel"), Some(&1));
        assert_eq!(
            list.listings[3].prices.tiers()[0].above,
            199_999,
            "this provider's is from the threshold on"
        );
    }
}
