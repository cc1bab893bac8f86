//! `farebox.toml` and the environment, read once into one typed [`Config`].
//!
//! Every mistake that can be seen before serving is an error here, and names its place. Each plain
//! key can be overridden by the environment (`FAREBOX_` and the key's name in capitals, its table
//! dropped); secrets come only from there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::formats::conversation::UpstreamFormat;
use crate::id::Wallet;
use crate::limits::{Network, Rates};
use crate::money::{MarkupBps, MicroUsdc, MoneyError, UnitPrice};
use crate::pricing::{
    Catalog, ImagePrice, ImageTokens, ModelKind, Offer, Prices, Reasoning, Tier, Unit, UnitPrices,
};

/// Where the configuration is looked for when no path is given.
pub const DEFAULT_PATH: &str = "farebox.toml";
/// The environment variable with the private key that pays for gas.
pub const RELAYER_KEY: &str = "FAREBOX_RELAYER_KEY";
/// The environment variable with the `Authorization` header for the facilitator.
pub const FACILITATOR_AUTH: &str = "FAREBOX_FACILITATOR_AUTH";
/// The environment variable with the private key of `pay_to`, which pays withdrawals.
pub const TREASURY_KEY: &str = "FAREBOX_TREASURY_KEY";
/// The environment variable with the secret that session tokens and nonces are signed with.
pub const SESSION_SECRET: &str = "FAREBOX_SESSION_SECRET";
/// The environment variable with the private key that receipts are signed with.
pub const RECEIPT_KEY: &str = "FAREBOX_RECEIPT_KEY";
/// As many as the hash of HS256 has (RFC 7518, section 3.2).
const MIN_SESSION_SECRET_BYTES: usize = 32;
/// A day: what is to last longer is what API keys are for.
pub const MAX_SESSION_MINUTES: u32 = 1440;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("there is no configuration at {0}: `farebox init` writes one to start from")]
    Missing(String),
    #[error("{path}: {source}")]
    Unreadable { path: String, source: std::io::Error },
    #[error("{path}: {message}")]
    Syntax { path: String, message: String },
    #[error("{place}: {problem}")]
    Invalid { place: String, problem: String },
}

fn invalid(place: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { place: place.into(), problem: problem.into() }
}

#[derive(Clone, Debug)]
pub struct Config {
    pub listen: String,
    pub public_url: Url,
    pub database_url: String,
    /// Empty: no metrics are served.
    pub metrics_listen: String,
    pub max_body_bytes: usize,
    pub log_format: LogFormat,
    /// Origins that browsers may call from; empty: any.
    pub cors_origins: Vec<String>,
    pub payments: Payments,
    pub markup: MarkupBps,
    pub auth: Auth,
    pub limits: Limits,
    pub providers: Vec<Provider>,
    pub catalog: Catalog,
    /// What receipts are signed with; `None`: the database keeps a key.
    pub receipt_key: Option<SecretString>,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Debug)]
pub struct Payments {
    pub chain_id: u64,
    pub token: Token,
    pub rpc_urls: Vec<Url>,
    pub pay_to: Wallet,
    pub min_topup: MicroUsdc,
    pub max_topup: MicroUsdc,
    pub confirmations: u64,
    /// The least that is asked for at once where a request is paid for by itself.
    pub min_inline: MicroUsdc,
    /// Of a wallet's top-ups, how much may be credited before it is final; zero: no ceiling.
    pub max_unfinalized: MicroUsdc,
    /// The most that is offered for a unit of gas.
    pub max_fee_gwei: u64,
    /// Contracts that may deploy a wallet whose signature comes before it (ERC-6492).
    pub erc6492_factories: Vec<Wallet>,
    /// How USDC that is just sent to `pay_to` is credited; `None`: it is not looked for.
    pub deposits: Option<Deposits>,
    pub withdrawals: Withdrawals,
    /// Of `pay_to`; `None`: nothing is paid out.
    pub treasury_key: Option<SecretString>,
    /// One key, or several between commas; empty, where a facilitator settles alone.
    pub relayer_keys: SecretString,
    /// Who is asked to settle before a relayer of ours does.
    pub facilitator: Option<Facilitator>,
}

/// A remote x402 facilitator.
#[derive(Clone, Debug)]
pub struct Facilitator {
    /// What `/settle`, `/verify` and `/supported` are below.
    pub url: Url,
    /// The whole value of the `Authorization` header.
    pub auth: Option<SecretString>,
    /// What it is told that a payment is for: an absolute URL.
    pub resource: String,
}

impl Payments {
    /// The network as CAIP-2 spells it.
    pub fn network(&self) -> String {
        format!("eip155:{}", self.chain_id)
    }
}

/// Deposits, as far as they are looked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Deposits {
    /// The least that is credited without the operator's word.
    pub min: MicroUsdc,
    /// Where the first search begins; `None`: with what is final then.
    pub from_block: Option<u64>,
}

/// What may be withdrawn, where there is a key to pay it with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Withdrawals {
    /// Keeps the gas in proportion, which the gateway pays.
    pub min: MicroUsdc,
    /// By a wallet within 24 hours; zero: any amount.
    pub wallet_daily: MicroUsdc,
    /// By all wallets together.
    pub daily: MicroUsdc,
}

/// The token that is taken, and the EIP-712 domain its authorizations are signed in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Token {
    pub address: Wallet,
    pub name: String,
    pub version: String,
}

#[derive(Clone, Debug)]
pub struct Auth {
    /// `host[:port]` values that a sign-in may name.
    pub siwe_domains: Vec<String>,
    /// Those of `public_url`, its own first, whatever `siwe_domains` says.
    pub public_domains: Vec<String>,
    pub chain_ids: Vec<u64>,
    pub session_minutes: u32,
    /// Whether a sign-in must carry a nonce of ours.
    pub require_server_nonce: bool,
    /// `None`: the database keeps one.
    pub session_secret: Option<SecretString>,
}

#[derive(Clone, Debug)]
pub struct Limits {
    pub rates: Rates,
    pub keys_per_wallet: u32,
    /// Whose word is taken for where a request comes from.
    pub trusted_proxies: Vec<Network>,
}

#[derive(Clone, Debug)]
pub struct Provider {
    pub name: String,
    /// The format that is spoken to it.
    pub format: UpstreamFormat,
    pub base_url: Url,
    /// Empty: it takes none. Of several, each is asked with in turn.
    pub api_keys: Vec<SecretString>,
    /// Establishing a connection, TLS included.
    pub connect_timeout: Duration,
    /// For so long it is not asked when it has failed so often in a row, nor with a key that it refuses.
    pub cooldown: Duration,
    pub failures_before_cooldown: u32,
    /// From sending the request to the answer's head.
    pub first_byte_timeout: Duration,
    /// Between two pieces of an answer.
    pub idle_timeout: Duration,
}

/// The environment, handed in so that a test can set it.
pub type Env = HashMap<String, String>;

impl Config {
    pub fn load(path: &Path, env: &Env) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ConfigError::Missing(shown.clone()),
            _ => ConfigError::Unreadable { path: shown.clone(), source },
        })?;
        let mut config = Self::parse(&text, &shown, env)?;
        // A model without a date of its own is as old as the list it stands in.
        config.catalog.date_undated(modified_seconds(path));
        Ok(config)
    }

    pub fn parse(text: &str, path: &str, env: &Env) -> Result<Self, ConfigError> {
        let syntax = |e: toml::de::Error| ConfigError::Syntax { path: path.into(), message: e.to_string() };
        // Read as written first, so that an error shows the line; then again with the overrides.
        let _: File = toml::from_str(text).map_err(syntax)?;
        let mut table: toml::Table = toml::from_str(text).map_err(syntax)?;
        override_from_env(&mut table, env)?;
        let file: File = table.try_into().map_err(|e: toml::de::Error| ConfigError::Syntax {
            path: "environment".into(),
            message: e.to_string(),
        })?;
        file.check(env)
    }

    pub fn provider(&self, name: &str) -> Option<&Provider> {
        self.providers.iter().find(|provider| provider.name == name)
    }
}

/// When a file was last written, in Unix seconds; 0 where the system does not say.
fn modified_seconds(path: &Path) -> i64 {
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let since = modified.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    since.and_then(|since| i64::try_from(since.as_secs()).ok()).unwrap_or_default()
}

/// The file as it is written, before any of it is believed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    listen: String,
    public_url: String,
    database_url: String,
    metrics_listen: String,
    max_body_mb: u32,
    log_format: LogFormat,
    cors_origins: Vec<String>,
    payments: Option<FilePayments>,
    pricing: FilePricing,
    auth: FileAuth,
    limits: FileLimits,
    providers: Vec<FileProvider>,
    models: Vec<FileModel>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".into(),
            public_url: "http://localhost:8080".into(),
            database_url: "sqlite://farebox.db".into(),
            metrics_listen: String::new(),
            max_body_mb: 20,
            log_format: LogFormat::Text,
            cors_origins: Vec::new(),
            payments: None,
            pricing: FilePricing::default(),
            auth: FileAuth::default(),
            limits: FileLimits::default(),
            providers: Vec::new(),
            models: Vec::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePayments {
    #[serde(default = "base")]
    network: String,
    asset: Option<String>,
    asset_name: Option<String>,
    asset_version: Option<String>,
    rpc_urls: Vec<String>,
    pay_to: String,
    #[serde(default = "one_usd")]
    min_topup_usd: String,
    #[serde(default = "ten_thousand_usd")]
    max_topup_usd: String,
    #[serde(default = "one")]
    confirmations: u64,
    #[serde(default = "one_cent")]
    min_inline_usd: String,
    #[serde(default = "zero_usd")]
    max_unfinalized_usd: String,
    #[serde(default = "ten")]
    max_fee_gwei: u64,
    #[serde(default)]
    erc6492_factories: Vec<String>,
    facilitator_url: Option<String>,
    #[serde(default)]
    deposits: bool,
    #[serde(default = "one_usd")]
    min_deposit_usd: String,
    #[serde(default)]
    deposits_from_block: u64,
    #[serde(default = "one_usd")]
    min_withdrawal_usd: String,
    #[serde(default = "thousand_usd")]
    withdrawals_per_wallet_day_usd: String,
    #[serde(default = "ten_thousand_usd")]
    withdrawals_per_day_usd: String,
}

fn thousand_usd() -> String {
    "1000".into()
}

fn zero_usd() -> String {
    "0".into()
}

/// Keeps the gas of a payment in proportion.
fn one_cent() -> String {
    "0.01".into()
}

/// A thousand times what Base usually asks.
fn ten() -> u64 {
    10
}

fn base() -> String {
    "eip155:8453".into()
}

fn one_usd() -> String {
    "1".into()
}

fn ten_thousand_usd() -> String {
    "10000".into()
}

fn one() -> u64 {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FilePricing {
    markup_bps: u32,
}

impl Default for FilePricing {
    fn default() -> Self {
        Self { markup_bps: 2000 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileAuth {
    siwe_domains: Vec<String>,
    chain_ids: Vec<u64>,
    session_minutes: u32,
    require_server_nonce: bool,
}

impl Default for FileAuth {
    fn default() -> Self {
        Self {
            siwe_domains: Vec::new(),
            chain_ids: Vec::new(),
            session_minutes: 60,
            require_server_nonce: false,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileLimits {
    requests_per_minute: u32,
    requests_per_day: u32,
    concurrent_requests: u32,
    unauthenticated_per_minute: u32,
    failed_payments_per_minute: u32,
    keys_per_wallet: u32,
    trusted_proxies: Vec<String>,
}

impl Default for FileLimits {
    fn default() -> Self {
        Self {
            requests_per_minute: 60,
            requests_per_day: 10_000,
            // A sixteenth of the connections that are served at once.
            concurrent_requests: 512,
            // High, because without trusted_proxies a proxy's users are all one address.
            unauthenticated_per_minute: 1200,
            failed_payments_per_minute: 120,
            keys_per_wallet: 20,
            trusted_proxies: Vec::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileProvider {
    name: String,
    #[serde(default = "openai_kind")]
    kind: String,
    base_url: String,
    /// Absent: the upstream takes no key, as a model server on the same machine may. One key, or several
    /// between commas.
    api_key_env: Option<String>,
    /// Of an `openai` one: whether it has `/responses`, too.
    #[serde(default)]
    responses: bool,
    #[serde(default = "ten_seconds")]
    connect_timeout_s: u32,
    #[serde(default = "half_a_minute")]
    cooldown_s: u32,
    #[serde(default = "five")]
    failures_before_cooldown: u32,
    #[serde(default = "five_minutes")]
    first_byte_timeout_s: u32,
    #[serde(default = "one_minute")]
    idle_timeout_s: u32,
}

fn openai_kind() -> String {
    "openai".into()
}

fn ten_seconds() -> u32 {
    10
}

fn half_a_minute() -> u32 {
    30
}

fn five() -> u32 {
    5
}

/// A long answer that is not streamed sends its head only when it is complete.
fn five_minutes() -> u32 {
    300
}

fn one_minute() -> u32 {
    60
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileModel {
    id: String,
    #[serde(default)]
    kind: ModelKind,
    provider: String,
    upstream_model: Option<String>,
    #[serde(default)]
    context_length: u64,
    #[serde(default)]
    max_output_tokens: u64,
    #[serde(default = "max_tokens")]
    max_tokens_field: String,
    #[serde(default = "reject")]
    reasoning: Reasoning,
    /// Other models of this list, which are asked in turn where this one cannot answer.
    #[serde(default)]
    fallbacks: Vec<String>,
    #[serde(default)]
    image_tokens: Vec<FileImageTokens>,
    #[serde(default)]
    created: i64,
    price: FilePrice,
}

/// The most tokens of a picture of a size and a quality; of any, where they are not said.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileImageTokens {
    size: Option<String>,
    quality: Option<String>,
    most: u64,
}

impl FileImageTokens {
    fn check(self, place: &dyn Fn(&str) -> String) -> Result<ImageTokens, ConfigError> {
        if self.most == 0 || self.most > MAX_CONTEXT {
            return Err(invalid(place("image_tokens"), "must be above 0, and are tokens of one picture"));
        }
        Ok(ImageTokens { size: self.size, quality: self.quality, most: self.most })
    }
}

fn max_tokens() -> String {
    "max_tokens".into()
}

fn reject() -> Reasoning {
    Reasoning::Reject
}

/// Prices in USD, each under the `config_key` of its [`Unit`]: of tokens and characters per million, of all else
/// for one.
#[derive(Default)]
struct FilePrice {
    rates: Vec<(Unit, String)>,
    images: Option<FileImages>,
    tiers: Vec<FilePrice>,
    /// Of a tier: for prompts of more tokens than this.
    above: Option<u64>,
}

/// One price for all pictures, or one for each size and quality.
#[derive(Deserialize)]
#[serde(untagged)]
enum FileImages {
    Each(String),
    List(Vec<FileImage>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileImage {
    size: Option<String>,
    quality: Option<String>,
    usd: String,
}

impl<'de> Deserialize<'de> for FilePrice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = FilePrice;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a table of prices")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FilePrice, A::Error> {
                let mut price = FilePrice::default();
                while let Some(key) = map.next_key::<String>()? {
                    match Unit::all().find(|unit| unit.config_key() == key) {
                        Some(Unit::Image) => price.images = Some(map.next_value()?),
                        Some(unit) => price.rates.push((unit, map.next_value()?)),
                        None if key == "tiers" => price.tiers = map.next_value()?,
                        None if key == "above" => price.above = Some(map.next_value()?),
                        None => return Err(A::Error::custom(unknown_price(&key))),
                    }
                }
                Ok(price)
            }
        }

        deserializer.deserialize_map(Keys)
    }
}

fn unknown_price(key: &str) -> String {
    let known: Vec<_> = Unit::all().map(Unit::config_key).collect();
    format!("unknown field `{key}` among prices, expected one of {}, tiers", known.join(", "))
}

impl FilePrice {
    fn check(self, place: &dyn Fn(&str) -> String, kind: ModelKind) -> Result<Prices, ConfigError> {
        if self.above.is_some() {
            return Err(invalid(
                place("price.above"),
                "belongs into a tier: tiers = [{ above = 200000, … }]",
            ));
        }
        let at = |key: &str| place(&format!("price.{key}"));
        let (rates, images) = check_rates(self.rates, self.images, &at)?;
        let mut tiers: Vec<Tier> = Vec::new();
        for tier in self.tiers {
            let above = tier.above.ok_or_else(|| invalid(at("tiers"), "need above = a number of tokens"))?;
            let at = |key: &str| at(&format!("tiers (above {above}).{key}"));
            if tiers.iter().any(|other| other.above == above) {
                return Err(invalid(at("above"), "is there twice"));
            }
            if tier.images.is_some() || !tier.tiers.is_empty() || tier.rates.is_empty() {
                return Err(invalid(at("price"), "must be prices of tokens, seconds, calls or the like"));
            }
            let (rates, _) = check_rates(tier.rates, None, &at)?;
            tiers.push(Tier { above, rates });
        }
        let prices = Prices::new(rates, tiers, images);
        if let Some(missing) = prices.missing_for(kind) {
            let keys: Vec<_> = missing.iter().map(|unit| unit.config_key()).collect();
            let problem = format!("needs {}, by which a {} model is paid", keys.join(" or "), kind.as_str());
            return Err(invalid(place("price"), problem));
        }
        Ok(prices)
    }
}

fn check_rates(
    texts: Vec<(Unit, String)>,
    images: Option<FileImages>,
    place: &dyn Fn(&str) -> String,
) -> Result<(UnitPrices, Vec<ImagePrice>), ConfigError> {
    let mut rates = UnitPrices::default();
    for (unit, text) in texts {
        rates = rates.with(unit, parse_price(unit, &text, place)?);
    }
    let mut list = Vec::new();
    match images {
        None => {}
        Some(FileImages::Each(usd)) => {
            rates = rates.with(Unit::Image, parse_price(Unit::Image, &usd, place)?);
        }
        Some(FileImages::List(images)) => {
            for FileImage { size, quality, usd } in images {
                list.push(ImagePrice { size, quality, price: parse_price(Unit::Image, &usd, place)? });
            }
        }
    }
    Ok((rates, list))
}

/// A price of a unit: USD for as many of it as prices are written for.
fn parse_price(unit: Unit, text: &str, place: &dyn Fn(&str) -> String) -> Result<UnitPrice, ConfigError> {
    // As amounts are written everywhere else here, without an exponent.
    let is_plain = !text.contains(['e', 'E']);
    let price =
        if is_plain { UnitPrice::parse_usd_per(unit.per(), text) } else { Err(MoneyError::NotADecimal) };
    price.map_err(|e| invalid(place(unit.config_key()), usd_problem(text, e)))
}

impl File {
    fn check(self, env: &Env) -> Result<Config, ConfigError> {
        let payments = self.payments.ok_or_else(|| {
            invalid("[payments]", "is missing: rpc_urls and pay_to say where top-ups arrive")
        })?;
        let public_url = parse_url("public_url", &self.public_url)?;
        let payments = payments.check(&public_url, env)?;
        let providers = check_providers(self.providers, env)?;
        let offers = check_models(self.models, &providers)?;
        if self.pricing.markup_bps > MarkupBps::MAX {
            return Err(invalid("pricing.markup_bps", "is above 100000 (+1000 %)"));
        }
        let receipt_key = check_receipt_key(&payments, env)?;
        let max_body_bytes = usize::try_from(self.max_body_mb).ok().and_then(|mb| mb.checked_mul(1 << 20));
        Ok(Config {
            listen: self.listen,
            database_url: check_database_url(self.database_url)?,
            metrics_listen: self.metrics_listen,
            max_body_bytes: max_body_bytes
                .filter(|bytes| *bytes > 0)
                .ok_or_else(|| invalid("max_body_mb", "must be at least 1"))?,
            log_format: self.log_format,
            cors_origins: check_origins(self.cors_origins)?,
            markup: MarkupBps::new(self.pricing.markup_bps),
            auth: self.auth.check(&public_url, payments.chain_id, env)?,
            limits: self.limits.check()?,
            public_url,
            payments,
            providers,
            catalog: Catalog::new(offers),
            receipt_key,
        })
    }
}

/// A key that signs transactions, or what the treasury pays, signs nothing else.
fn check_receipt_key(payments: &Payments, env: &Env) -> Result<Option<SecretString>, ConfigError> {
    let Some(key) = env.get(RECEIPT_KEY).filter(|key| !key.is_empty()) else { return Ok(None) };
    let plain = |key: &str| key.trim().trim_start_matches("0x").to_ascii_lowercase();
    let is_like = |other: &str| plain(other) == plain(key);
    for (name, is_the_same) in [
        (RELAYER_KEY, payments.relayer_keys.expose_secret().split(',').any(is_like)),
        (TREASURY_KEY, payments.treasury_key.as_ref().is_some_and(|key| is_like(key.expose_secret()))),
    ] {
        if is_the_same {
            return Err(invalid(RECEIPT_KEY, format!("must be another key than {name}")));
        }
    }
    Ok(Some(SecretString::from(key.clone())))
}

impl FilePayments {
    fn check(self, public_url: &Url, env: &Env) -> Result<Payments, ConfigError> {
        let chain_id = self
            .network
            .strip_prefix("eip155:")
            .and_then(|id| id.parse().ok())
            .ok_or_else(|| invalid("payments.network", "must look like eip155:8453"))?;
        let token = self.token(chain_id)?;
        if self.rpc_urls.is_empty() {
            return Err(invalid("payments.rpc_urls", "needs at least one address"));
        }
        let rpc_urls = self.rpc_urls.iter().map(|url| parse_url("payments.rpc_urls", url));
        let pay_to = parse_address("payments.pay_to", &self.pay_to)?;
        let min_topup = parse_usd("payments.min_topup_usd", &self.min_topup_usd)?;
        let max_topup = parse_usd("payments.max_topup_usd", &self.max_topup_usd)?;
        if min_topup <= MicroUsdc::ZERO || max_topup < min_topup {
            return Err(invalid("payments", "0 < min_topup_usd ≤ max_topup_usd does not hold"));
        }
        if self.confirmations == 0 {
            return Err(invalid("payments.confirmations", "must be at least 1, the block it is mined in"));
        }
        let min_inline = parse_usd("payments.min_inline_usd", &self.min_inline_usd)?;
        if min_inline <= MicroUsdc::ZERO || min_inline > max_topup {
            return Err(invalid("payments.min_inline_usd", "must be above 0 and at most max_topup_usd"));
        }
        let max_unfinalized = parse_usd("payments.max_unfinalized_usd", &self.max_unfinalized_usd)?;
        if max_unfinalized < MicroUsdc::ZERO {
            return Err(invalid("payments.max_unfinalized_usd", "must not be below 0"));
        }
        if self.max_fee_gwei == 0 {
            return Err(invalid("payments.max_fee_gwei", "must be at least 1"));
        }
        let min_deposit = parse_usd("payments.min_deposit_usd", &self.min_deposit_usd)?;
        if min_deposit <= MicroUsdc::ZERO {
            return Err(invalid("payments.min_deposit_usd", "must be above 0"));
        }
        let from_block = Some(self.deposits_from_block).filter(|block| *block > 0);
        let withdrawals = self.withdrawals()?;
        let treasury_key = env.get(TREASURY_KEY).filter(|key| !key.is_empty());
        let factories = self.erc6492_factories.iter();
        let factories = factories.map(|address| parse_address("payments.erc6492_factories", address));
        let facilitator = self.facilitator(public_url, env)?;
        let relayer_key = env.get(RELAYER_KEY).filter(|key| !key.is_empty());
        if relayer_key.is_none() && facilitator.is_none() {
            return Err(invalid(
                RELAYER_KEY,
                "is not set: the private key (0x…) of the account that pays for gas; or set \
                 payments.facilitator_url to have payments settled by another",
            ));
        }
        if relayer_key.is_none() && treasury_key.is_some() {
            return Err(invalid(
                TREASURY_KEY,
                format!("pays withdrawals, which a relayer of ours sends: set {RELAYER_KEY} too"),
            ));
        }
        Ok(Payments {
            chain_id,
            token,
            rpc_urls: rpc_urls.collect::<Result<_, _>>()?,
            pay_to,
            min_topup,
            max_topup,
            confirmations: self.confirmations,
            min_inline,
            max_unfinalized,
            max_fee_gwei: self.max_fee_gwei,
            erc6492_factories: factories.collect::<Result<_, _>>()?,
            deposits: self.deposits.then_some(Deposits { min: min_deposit, from_block }),
            withdrawals,
            treasury_key: treasury_key.cloned().map(SecretString::from),
            relayer_keys: SecretString::from(relayer_key.cloned().unwrap_or_default()),
            facilitator,
        })
    }

    fn facilitator(&self, public_url: &Url, env: &Env) -> Result<Option<Facilitator>, ConfigError> {
        let place = "payments.facilitator_url";
        let Some(text) = self.facilitator_url.as_ref().filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let url = parse_url(place, text)?;
        let has_more = url.query().is_some() || url.fragment().is_some();
        if has_more || !url.username().is_empty() || url.password().is_some() {
            return Err(invalid(
                place,
                format!(
                    "must be scheme, host and path alone; what authenticates us goes into {FACILITATOR_AUTH}"
                ),
            ));
        }
        let auth = env.get(FACILITATOR_AUTH).filter(|value| !value.is_empty());
        if auth.is_some_and(|value| HeaderValue::from_str(value).is_err()) {
            return Err(invalid(FACILITATOR_AUTH, "is not what an HTTP header can hold"));
        }
        let resource = format!("{}/v1/topup", public_url.as_str().trim_end_matches('/'));
        Ok(Some(Facilitator { url, auth: auth.cloned().map(SecretString::from), resource }))
    }

    fn withdrawals(&self) -> Result<Withdrawals, ConfigError> {
        let withdrawals = Withdrawals {
            min: parse_usd("payments.min_withdrawal_usd", &self.min_withdrawal_usd)?,
            wallet_daily: parse_usd(
                "payments.withdrawals_per_wallet_day_usd",
                &self.withdrawals_per_wallet_day_usd,
            )?,
            daily: parse_usd("payments.withdrawals_per_day_usd", &self.withdrawals_per_day_usd)?,
        };
        if withdrawals.min <= MicroUsdc::ZERO {
            return Err(invalid("payments.min_withdrawal_usd", "must be above 0, as each costs gas"));
        }
        if withdrawals.wallet_daily < MicroUsdc::ZERO || withdrawals.daily < MicroUsdc::ZERO {
            return Err(invalid("payments", "withdrawals_per_…day_usd must not be below 0 (0: any amount)"));
        }
        Ok(withdrawals)
    }

    /// USDC on Base and Base Sepolia is known (Circle's list of contract addresses); any other
    /// token is spelled out.
    fn token(&self, chain_id: u64) -> Result<Token, ConfigError> {
        let known = match chain_id {
            8453 => Some(("0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913", "USD Coin", "2")),
            84532 => Some(("0x036CbD53842c5426634e7929541eC2318f3dCF7e", "USDC", "2")),
            _ => None,
        };
        let pick = |key: &str, own: &Option<String>, known: Option<&str>| {
            own.clone()
                .or(known.map(str::to_owned))
                .ok_or_else(|| invalid(format!("payments.{key}"), format!("is needed on {}", self.network)))
        };
        let address = pick("asset", &self.asset, known.map(|k| k.0))?;
        Ok(Token {
            address: parse_address("payments.asset", &address)?,
            name: pick("asset_name", &self.asset_name, known.map(|k| k.1))?,
            version: pick("asset_version", &self.asset_version, known.map(|k| k.2))?,
        })
    }
}

impl FileLimits {
    fn check(self) -> Result<Limits, ConfigError> {
        let network = |text: &String| {
            text.parse().map_err(|e| invalid("limits.trusted_proxies", format!("{text:?} is {e}")))
        };
        Ok(Limits {
            rates: Rates {
                requests_per_minute: self.requests_per_minute,
                requests_per_day: self.requests_per_day,
                concurrent_requests: self.concurrent_requests,
                unauthenticated_per_minute: self.unauthenticated_per_minute,
                failed_payments_per_minute: self.failed_payments_per_minute,
            },
            keys_per_wallet: self.keys_per_wallet,
            trusted_proxies: self.trusted_proxies.iter().map(network).collect::<Result<_, _>>()?,
        })
    }
}

impl FileAuth {
    fn check(self, public_url: &Url, payments_chain: u64, env: &Env) -> Result<Auth, ConfigError> {
        let public_domains = default_domains(public_url);
        let siwe_domains = if self.siwe_domains.is_empty() {
            public_domains.clone()
        } else {
            for domain in &self.siwe_domains {
                if domain.ends_with(":443") || domain.ends_with(":80") {
                    return Err(invalid(
                        "auth.siwe_domains",
                        format!("{domain:?}: leave out the port, as browsers do with the usual ones"),
                    ));
                }
                let alone = Url::parse(&format!("http://{domain}")).is_ok_and(|url| {
                    url.path() == "/" && url.username().is_empty() && !domain.ends_with('/')
                });
                if !alone {
                    return Err(invalid("auth.siwe_domains", format!("{domain:?} is not host or host:port")));
                }
            }
            self.siwe_domains.iter().map(|domain| domain.to_ascii_lowercase()).collect()
        };
        let chain_ids = if self.chain_ids.is_empty() { vec![payments_chain] } else { self.chain_ids };
        if !(1..=MAX_SESSION_MINUTES).contains(&self.session_minutes) {
            let problem = format!("must be between 1 and {MAX_SESSION_MINUTES}");
            return Err(invalid("auth.session_minutes", problem));
        }
        let session_secret = env.get(SESSION_SECRET).filter(|secret| !secret.is_empty());
        if session_secret.is_some_and(|secret| secret.len() < MIN_SESSION_SECRET_BYTES) {
            let problem =
                format!("is shorter than {MIN_SESSION_SECRET_BYTES} bytes: `openssl rand -hex 32` makes one");
            return Err(invalid(SESSION_SECRET, problem));
        }
        Ok(Auth {
            siwe_domains,
            public_domains,
            chain_ids,
            session_minutes: self.session_minutes,
            require_server_nonce: self.require_server_nonce,
            session_secret: session_secret.cloned().map(SecretString::from),
        })
    }
}

/// The domain of the public address, which comes first; of a machine's own, both of its names.
fn default_domains(public_url: &Url) -> Vec<String> {
    let host = public_url.host_str().unwrap_or_default();
    let with_port = |host: &str| match public_url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    match host {
        "localhost" => vec![with_port("localhost"), with_port("127.0.0.1")],
        "127.0.0.1" => vec![with_port("127.0.0.1"), with_port("localhost")],
        other => vec![with_port(other)],
    }
}

fn check_providers(files: Vec<FileProvider>, env: &Env) -> Result<Vec<Provider>, ConfigError> {
    let mut names = HashSet::new();
    let mut providers = Vec::new();
    for file in files {
        let place = |key: &str| format!("providers ({}).{key}", file.name);
        if file.name.is_empty() || file.name.contains('/') {
            return Err(invalid("providers.name", "must be a word without a slash"));
        }
        if !names.insert(file.name.clone()) {
            return Err(invalid(place("name"), "is used twice"));
        }
        let format = match (file.kind.as_str(), file.responses) {
            ("openai", false) => UpstreamFormat::Chat,
            ("openai", true) => UpstreamFormat::Responses,
            ("anthropic", false) => UpstreamFormat::Messages,
            ("gemini", false) => UpstreamFormat::Gemini,
            ("anthropic" | "gemini", true) => {
                return Err(invalid(place("responses"), "is for providers of kind \"openai\" only"));
            }
            (other, _) => {
                let known = "known are \"openai\", \"anthropic\" and \"gemini\"";
                return Err(invalid(place("kind"), format!("{other:?} is not known; {known}")));
            }
        };
        let api_keys = match &file.api_key_env {
            None => Vec::new(),
            Some(name) => check_keys(&place("api_key_env"), name, env)?,
        };
        let seconds = [
            file.connect_timeout_s,
            file.first_byte_timeout_s,
            file.idle_timeout_s,
            file.cooldown_s,
            file.failures_before_cooldown,
        ];
        if seconds.contains(&0) {
            let problem = "connect_timeout_s, first_byte_timeout_s, idle_timeout_s, cooldown_s and \
                           failures_before_cooldown must be at least 1";
            return Err(invalid(place("timeouts"), problem));
        }
        providers.push(Provider {
            format,
            base_url: parse_url(&place("base_url"), &file.base_url)?,
            api_keys,
            connect_timeout: Duration::from_secs(file.connect_timeout_s.into()),
            cooldown: Duration::from_secs(file.cooldown_s.into()),
            failures_before_cooldown: file.failures_before_cooldown,
            first_byte_timeout: Duration::from_secs(file.first_byte_timeout_s.into()),
            idle_timeout: Duration::from_secs(file.idle_timeout_s.into()),
            name: file.name,
        });
    }
    if providers.is_empty() {
        return Err(invalid("[[providers]]", "is missing: name at least one upstream"));
    }
    Ok(providers)
}

/// The keys in a variable of the environment.
fn check_keys(place: &str, name: &str, env: &Env) -> Result<Vec<SecretString>, ConfigError> {
    let keys = env.get(name).map(String::as_str).unwrap_or_default();
    let keys: Vec<_> = keys.split(',').map(str::trim).filter(|key| !key.is_empty()).collect();
    if keys.is_empty() {
        return Err(invalid(place, format!("{name} is not set in the environment")));
    }
    if keys.len() > MAX_KEYS {
        return Err(invalid(place, format!("{name} has more than {MAX_KEYS} keys")));
    }
    if keys.iter().any(|key| !key.bytes().all(|byte| byte.is_ascii_graphic())) {
        return Err(invalid(place, format!("{name} has a key with characters that no header may hold")));
    }
    Ok(keys.into_iter().map(SecretString::from).collect())
}

/// More than anybody has of one provider.
const MAX_KEYS: usize = 64;
/// Each may take as long as its time-outs allow, one after the other.
const MAX_FALLBACKS: usize = 4;

fn check_models(files: Vec<FileModel>, providers: &[Provider]) -> Result<Vec<Offer>, ConfigError> {
    let mut ids = HashSet::new();
    let mut offers = Vec::new();
    for file in files {
        let place = |key: &str| format!("models ({}).{key}", file.id);
        let name = match file.id.split_once('/') {
            Some((provider, name)) if !provider.is_empty() && !name.is_empty() => name.to_owned(),
            _ => return Err(invalid(place("id"), "must be provider/name")),
        };
        if !ids.insert(file.id.clone()) {
            return Err(invalid(place("id"), "is used twice"));
        }
        if !providers.iter().any(|provider| provider.name == file.provider) {
            return Err(invalid(place("provider"), format!("{:?} is not configured", file.provider)));
        }
        if file.context_length == 0 && matches!(file.kind, ModelKind::Chat | ModelKind::Embedding) {
            return Err(invalid(place("context_length"), "must be above 0"));
        }
        if file.max_output_tokens == 0 && file.kind == ModelKind::Chat {
            return Err(invalid(place("max_output_tokens"), "must be above 0"));
        }
        if file.context_length > MAX_CONTEXT || file.max_output_tokens > MAX_CONTEXT {
            return Err(invalid(place("context_length"), "or max_output_tokens is out of range"));
        }
        let prices = file.price.check(&place, file.kind)?;
        let image_tokens =
            file.image_tokens.into_iter().map(|row| row.check(&place)).collect::<Result<_, _>>()?;
        offers.push(Offer {
            upstream_model: file.upstream_model.clone().unwrap_or(name),
            kind: file.kind,
            prices: Arc::new(prices),
            price_version: None,
            provider: file.provider,
            context_length: file.context_length,
            max_output_tokens: file.max_output_tokens,
            max_tokens_field: file.max_tokens_field,
            reasoning: file.reasoning,
            fallbacks: file.fallbacks,
            image_tokens,
            created: file.created,
            id: file.id,
        });
    }
    check_fallbacks(&offers)?;
    if let Some(idle) = providers.iter().find(|p| !offers.iter().any(|offer| offer.provider == p.name)) {
        return Err(invalid(
            format!("providers ({})", idle.name),
            "has no models: add [[models]] or take it out",
        ));
    }
    Ok(offers)
}

fn check_fallbacks(offers: &[Offer]) -> Result<(), ConfigError> {
    for offer in offers {
        let refuse = |problem: String| Err(invalid(format!("models ({}).fallbacks", offer.id), problem));
        if offer.fallbacks.len() > MAX_FALLBACKS {
            return refuse(format!("are more than {MAX_FALLBACKS}"));
        }
        for (i, id) in offer.fallbacks.iter().enumerate() {
            if *id == offer.id || offer.fallbacks.iter().take(i).any(|other| other == id) {
                return refuse(format!("name {id:?} once too often"));
            }
            match offers.iter().find(|other| other.id == *id) {
                None => return refuse(format!("name {id:?}, which is no model of this list")),
                Some(other) if other.kind != offer.kind => {
                    return refuse(format!("name {id:?}, which is for {}", other.kind.as_str()));
                }
                Some(_) => {}
            }
        }
    }
    Ok(())
}

/// A billion tokens: far above any model, and small enough that every product fits.
const MAX_CONTEXT: u64 = 1_000_000_000;

fn check_database_url(url: String) -> Result<String, ConfigError> {
    let known = ["sqlite://", "postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
    if !known {
        return Err(invalid("database_url", "must begin with sqlite:// or postgres://"));
    }
    if url.strip_prefix("sqlite://").is_some_and(|path| path.is_empty() || path.contains(":memory:")) {
        return Err(invalid("database_url", "must name a file: the books are not kept in memory"));
    }
    Ok(url)
}

fn check_origins(origins: Vec<String>) -> Result<Vec<String>, ConfigError> {
    if origins.iter().any(|origin| origin == "*") {
        return Ok(Vec::new());
    }
    for origin in &origins {
        let exact = Url::parse(origin).is_ok_and(|url| url.origin().ascii_serialization() == *origin);
        if !exact {
            return Err(invalid(
                "cors_origins",
                format!("{origin:?} is not an origin such as https://app.example"),
            ));
        }
    }
    Ok(origins)
}

fn parse_url(place: &str, text: &str) -> Result<Url, ConfigError> {
    let url = Url::parse(text).map_err(|e| invalid(place, format!("{text:?} is not a URL: {e}")))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(invalid(place, format!("{text:?} is not an http(s) URL")));
    }
    Ok(url)
}

fn parse_address(place: &str, text: &str) -> Result<Wallet, ConfigError> {
    let wallet: Wallet = text.parse().map_err(|e| invalid(place, format!("{text:?} is {e}")))?;
    if wallet.0.is_zero() {
        return Err(invalid(place, "is the zero address: what is sent there is lost"));
    }
    Ok(wallet)
}

fn parse_usd(place: &str, text: &str) -> Result<MicroUsdc, ConfigError> {
    MicroUsdc::parse_usd(text).map_err(|e| invalid(place, usd_problem(text, e)))
}

fn usd_problem(text: &str, error: MoneyError) -> String {
    format!("{text:?} is {error}: write USD as a decimal string such as \"0.15\"")
}

#[derive(Copy, Clone)]
enum Kind {
    Text,
    Integer,
    Flag,
    TextList,
    IntegerList,
}

impl Kind {
    fn noun(self) -> &'static str {
        match self {
            Self::Flag => "true or false",
            _ => "a number",
        }
    }
}

/// Every plain key: its table, its name, its kind.
const KEYS: &[(&str, &str, Kind)] = &[
    ("", "listen", Kind::Text),
    ("", "public_url", Kind::Text),
    ("", "database_url", Kind::Text),
    ("", "metrics_listen", Kind::Text),
    ("", "max_body_mb", Kind::Integer),
    ("", "log_format", Kind::Text),
    ("", "cors_origins", Kind::TextList),
    ("payments", "network", Kind::Text),
    ("payments", "asset", Kind::Text),
    ("payments", "asset_name", Kind::Text),
    ("payments", "asset_version", Kind::Text),
    ("payments", "rpc_urls", Kind::TextList),
    ("payments", "pay_to", Kind::Text),
    ("payments", "min_topup_usd", Kind::Text),
    ("payments", "max_topup_usd", Kind::Text),
    ("payments", "confirmations", Kind::Integer),
    ("payments", "min_inline_usd", Kind::Text),
    ("payments", "max_unfinalized_usd", Kind::Text),
    ("payments", "max_fee_gwei", Kind::Integer),
    ("payments", "erc6492_factories", Kind::TextList),
    ("payments", "facilitator_url", Kind::Text),
    ("payments", "deposits", Kind::Flag),
    ("payments", "min_deposit_usd", Kind::Text),
    ("payments", "deposits_from_block", Kind::Integer),
    ("payments", "min_withdrawal_usd", Kind::Text),
    ("payments", "withdrawals_per_wallet_day_usd", Kind::Text),
    ("payments", "withdrawals_per_day_usd", Kind::Text),
    ("pricing", "markup_bps", Kind::Integer),
    ("auth", "siwe_domains", Kind::TextList),
    ("auth", "chain_ids", Kind::IntegerList),
    ("auth", "session_minutes", Kind::Integer),
    ("auth", "require_server_nonce", Kind::Flag),
    ("limits", "requests_per_minute", Kind::Integer),
    ("limits", "requests_per_day", Kind::Integer),
    ("limits", "concurrent_requests", Kind::Integer),
    ("limits", "unauthenticated_per_minute", Kind::Integer),
    ("limits", "failed_payments_per_minute", Kind::Integer),
    ("limits", "keys_per_wallet", Kind::Integer),
    ("limits", "trusted_proxies", Kind::TextList),
];

fn override_from_env(table: &mut toml::Table, env: &Env) -> Result<(), ConfigError> {
    for (section, key, kind) in KEYS {
        let name = format!("FAREBOX_{}", key.to_ascii_uppercase());
        let Some(text) = env.get(&name) else { continue };
        let value = env_value(*kind, text)
            .ok_or_else(|| invalid(&name, format!("{text:?} is not {}", kind.noun())))?;
        let target = if section.is_empty() {
            &mut *table
        } else {
            let entry = table.entry(*section).or_insert_with(|| toml::Table::new().into());
            entry.as_table_mut().ok_or_else(|| invalid(*section, "must be a table"))?
        };
        target.insert((*key).to_owned(), value);
    }
    Ok(())
}

fn env_value(kind: Kind, text: &str) -> Option<toml::Value> {
    let integer = |text: &str| text.trim().parse::<i64>().ok().map(toml::Value::Integer);
    let parts = || text.split(',').map(str::trim).filter(|part| !part.is_empty());
    match kind {
        Kind::Text => Some(toml::Value::String(text.to_owned())),
        Kind::Integer => integer(text),
        Kind::Flag => text.trim().parse().ok().map(toml::Value::Boolean),
        Kind::TextList => {
            Some(parts().map(|part| toml::Value::String(part.to_owned())).collect::<Vec<_>>().into())
        }
        Kind::IntegerList => parts().map(integer).collect::<Option<Vec<_>>>().map(Into::into),
    }
}

/// The commented file that `farebox init` writes.
pub fn starter() -> &'static str {
    include_str!("../farebox.example.toml")
}

/// What `farebox check-config` prints: what would be served, and at which billed prices.
pub fn summary(config: &Config) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let payments = &config.payments;
    let mut facts = BTreeMap::new();
    facts.insert("listen", config.listen.clone());
    facts.insert("public_url", config.public_url.to_string());
    facts.insert("network", payments.network());
    facts.insert("asset", format!("{} ({})", payments.token.address, payments.token.name));
    facts.insert("pay_to", payments.pay_to.to_string());
    facts
        .insert("top-ups", format!("{} to {} USD", payments.min_topup.to_usd(), payments.max_topup.to_usd()));
    if let Some(facilitator) = &payments.facilitator {
        // The rest of an address may hold a key.
        facts.insert("facilitator", facilitator.url.host_str().unwrap_or_default().to_owned());
    }
    facts.insert("markup", format!("{} bps", config.markup.get()));
    facts.insert("siwe_domains", config.auth.siwe_domains.join(", "));
    facts.insert("prices", format!("version {}", config.catalog.version()));
    for (name, value) in facts {
        let _ = writeln!(out, "{name:<13} {value}");
    }
    let _ = writeln!(
        out,
        "\n{:<40} {:<14} {:>12} {:>12} {:>12}",
        "model", "provider", "prompt", "cached", "completion"
    );
    for offer in config.catalog.iter() {
        let billed = |price: UnitPrice| price.to_billed_usd_per_million(config.markup);
        let prices = &offer.prices;
        let _ = writeln!(
            out,
            "{:<40} {:<14} {:>12} {:>12} {:>12}",
            offer.id,
            offer.provider,
            billed(prices.charged(Unit::Prompt)),
            billed(prices.charged(Unit::CachedPrompt)),
            billed(prices.charged(Unit::Completion))
        );
        for line in other_prices(prices, config.markup) {
            let _ = writeln!(out, "    {line}");
        }
    }
    let _ = writeln!(
        out,
        "\nPrices are USD as billed, markup included: of tokens and characters per million, of all else for one."
    );
    out
}

/// What the three columns of a model's line do not say: other units, tiers, pictures.
fn other_prices(prices: &Prices, markup: MarkupBps) -> Vec<String> {
    let in_columns = [Unit::Prompt, Unit::CachedPrompt, Unit::Completion];
    let list = |rates: &UnitPrices, but: &[Unit]| {
        let rates = rates.iter().filter(|(unit, _)| !but.contains(unit));
        let rates = rates.map(|(unit, price)| {
            format!("{} {}", unit.config_key(), price.to_billed_usd_per(unit.per(), markup))
        });
        rates.collect::<Vec<_>>().join(", ")
    };
    let others = Some(list(prices.rates(), &in_columns)).filter(|text| !text.is_empty());
    let tiers = prices.tiers().iter();
    let tiers = tiers.map(|tier| format!("above {} prompt tokens: {}", tier.above, list(&tier.rates, &[])));
    let images = prices.images().iter().map(|image| {
        let word = |text: &Option<String>| text.clone().unwrap_or_else(|| "any".into());
        let usd = image.price.to_billed_usd_per(Unit::Image.per(), markup);
        format!("a picture of size {} and quality {}: {usd}", word(&image.size), word(&image.quality))
    });
    others.into_iter().chain(tiers).chain(images).collect()
}
