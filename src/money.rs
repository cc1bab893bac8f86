//! Amounts as checked integers: micro-USDC for what wallets own, pico-USD for what things cost.
//!
//! One USDC counts as one USD. 1 USD = 10^6 micro-USDC = 10^12 pico-USD, so a price of one
//! millionth of a dollar per million tokens is still a whole number of pico-USD per token.

use std::fmt;

/// Micro-USDC, the token's own smallest unit: what balances, holds and charges are kept in.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MicroUsdc(i64);

/// Pico-USD: what costs are added up in before they are rounded, once, to micro-USDC.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct PicoUsd(i128);

/// Pico-USD per unit, such as a token. A list price of "0.15" USD per million tokens is 150,000.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct UnitPrice(i64);

/// Basis points added to cost; 2000 is +20 %.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct MarkupBps(u32);

/// Micro-USDC in one USD.
const MICRO_PER_USD: i128 = 1_000_000;
/// Pico-USD in one micro-USDC.
const PICO_PER_MICRO: i128 = 1_000_000;
/// Basis points in the whole.
const BPS: i128 = 10_000;

#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MoneyError {
    #[error("not a decimal number")]
    NotADecimal,
    #[error("more than 6 decimals")]
    TooPrecise,
    #[error("finer than a millionth of a millionth of a USD")]
    FinerThanPico,
    #[error("out of range")]
    OutOfRange,
}

impl MicroUsdc {
    pub const ZERO: Self = Self(0);

    pub const fn new(micro: i64) -> Self {
        Self(micro)
    }

    pub const fn get(self) -> i64 {
        self.0
    }

    /// Parses USD as a decimal, `"5"`, `"0.01"`, exactly: never through a float.
    pub fn parse_usd(text: &str) -> Result<Self, MoneyError> {
        parse_scaled_6(text).map(Self)
    }

    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    pub fn to_pico(self) -> PicoUsd {
        PicoUsd(i128::from(self.0) * PICO_PER_MICRO)
    }

    /// As USD with up to six decimals and no trailing zeros: `"5"`, `"0.000011"`.
    pub fn to_usd(self) -> String {
        decimal_6(i128::from(self.0))
    }
}

impl fmt::Debug for MicroUsdc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}µ", self.0)
    }
}

impl fmt::Display for MicroUsdc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl PicoUsd {
    pub const ZERO: Self = Self(0);

    pub const fn new(pico: i128) -> Self {
        Self(pico)
    }

    pub const fn get(self) -> i128 {
        self.0
    }

    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// What a wallet pays for this cost: the markup added, then rounded up to micro-USDC, once.
    pub fn charge(self, markup: MarkupBps) -> Option<MicroUsdc> {
        let factor = BPS + i128::from(markup.0);
        let scaled = self.0.checked_mul(factor)?;
        i64::try_from(div_ceil(scaled, BPS * PICO_PER_MICRO)).ok().map(MicroUsdc)
    }

    /// As USD, exactly: up to twelve decimals.
    pub fn to_usd(self) -> String {
        decimal(self.0, 12)
    }

    /// Parses an amount of USD as a JSON number is written, `4.2e-05` too, rounded up to whole pico-USD:
    /// for what others report, at whatever precision.
    pub fn parse_usd_rounded_up(text: &str) -> Result<Self, MoneyError> {
        let (pico, has_rest) = parse_decimal(text, 12)?;
        Ok(Self(pico + i128::from(has_rest && pico >= 0)))
    }

    /// As USD rounded half away from zero to six decimals, for figures that are only shown.
    pub fn to_usd_rounded(self) -> String {
        let half = if self.0 < 0 { -PICO_PER_MICRO / 2 } else { PICO_PER_MICRO / 2 };
        decimal_6((self.0 + half) / PICO_PER_MICRO)
    }
}

impl UnitPrice {
    pub const ZERO: Self = Self(0);

    pub const fn new(pico_per_unit: i64) -> Self {
        Self(pico_per_unit)
    }

    pub const fn get(self) -> i64 {
        self.0
    }

    /// Parses USD per million units. Six decimals there are whole pico-USD per unit.
    pub fn parse_usd_per_million(text: &str) -> Result<Self, MoneyError> {
        let pico = parse_scaled_6(text)?;
        if pico < 0 { Err(MoneyError::OutOfRange) } else { Ok(Self(pico)) }
    }

    /// Parses USD per unit as a JSON number is written, `1.5e-07` too, exactly: never through a float.
    pub fn parse_usd(text: &str) -> Result<Self, MoneyError> {
        Self::parse_usd_per(1, text)
    }

    /// The same of USD per so many units, as a price per second is per thousand milliseconds. What is no
    /// whole number of pico-USD for one is refused.
    pub fn parse_usd_per(units: u32, text: &str) -> Result<Self, MoneyError> {
        let (pico, has_rest) = parse_decimal(text, 12)?;
        if has_rest || units == 0 || pico % i128::from(units) != 0 {
            return Err(MoneyError::FinerThanPico);
        }
        let each = i64::try_from(pico / i128::from(units)).map_err(|_| MoneyError::OutOfRange)?;
        if each < 0 { Err(MoneyError::OutOfRange) } else { Ok(Self(each)) }
    }

    /// USD per so many units, at cost, exactly.
    pub fn to_usd_per(self, units: u32) -> String {
        decimal(i128::from(self.0) * i128::from(units), 12)
    }

    /// The same as billed; exact, as markup is in hundredths of a percent.
    pub fn to_billed_usd_per(self, units: u32, markup: MarkupBps) -> String {
        decimal(i128::from(self.0) * i128::from(units) * (BPS + i128::from(markup.0)), 16)
    }

    pub fn times(self, units: u64) -> Option<PicoUsd> {
        i128::from(self.0).checked_mul(i128::from(units)).map(PicoUsd)
    }

    /// USD per million units, at cost.
    pub fn to_usd_per_million(self) -> String {
        decimal_6(i128::from(self.0))
    }

    /// USD per million units as billed; exact, as markup is in hundredths of a percent.
    pub fn to_billed_usd_per_million(self, markup: MarkupBps) -> String {
        let scaled = i128::from(self.0) * (BPS + i128::from(markup.0));
        decimal(scaled, 10)
    }
}

impl MarkupBps {
    /// Above +1000 % a configuration is a mistake.
    pub const MAX: u32 = 100_000;

    pub const fn new(bps: u32) -> Self {
        Self(bps)
    }

    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Rounds up. Both signs are right, though a cost is never below zero.
fn div_ceil(value: i128, by: i128) -> i128 {
    value.div_euclid(by) + i128::from(value.rem_euclid(by) != 0)
}

/// `[-]digits[.1–6 digits]` as an integer scaled by 10^6.
fn parse_scaled_6(text: &str) -> Result<i64, MoneyError> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match digits.split_once('.') {
        Some((_, "")) => return Err(MoneyError::NotADecimal),
        Some((whole, fraction)) => (whole, fraction),
        None => (digits, ""),
    };
    let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) {
        return Err(MoneyError::NotADecimal);
    }
    if fraction.len() > 6 {
        return Err(MoneyError::TooPrecise);
    }
    let parse = |s: &str| s.parse::<i64>().map_err(|_| MoneyError::OutOfRange);
    let micro = parse(&format!("{fraction:0<6}"))?;
    let value = i128::from(parse(whole)?) * MICRO_PER_USD + i128::from(micro);
    i64::try_from(if negative { -value } else { value }).map_err(|_| MoneyError::OutOfRange)
}

/// `[-]digits[.digits][e[+|-]digits]`, as JSON writes numbers, scaled by 10^`places`; and whether there was more
/// to it than that.
pub fn parse_decimal(text: &str, places: i64) -> Result<(i128, bool), MoneyError> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, parse_exponent(exponent)?),
        None => (text, 0),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((_, "")) => return Err(MoneyError::NotADecimal),
        Some((whole, fraction)) => (whole, fraction),
        None => (mantissa, ""),
    };
    let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) {
        return Err(MoneyError::NotADecimal);
    }
    let digits = format!("{whole}{fraction}");
    let fraction = i64::try_from(fraction.len()).map_err(|_| MoneyError::OutOfRange)?;
    // The decimal point stands `shift` digits behind the last one.
    let shift = exponent.checked_sub(fraction).and_then(|shift| shift.checked_add(places));
    let shift = shift.ok_or(MoneyError::OutOfRange)?;
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Ok((0, false));
    }
    let length = i64::try_from(digits.len()).map_err(|_| MoneyError::OutOfRange)?;
    if length.saturating_add(shift) > MAX_DIGITS {
        return Err(MoneyError::OutOfRange);
    }
    let (kept, rest) = match usize::try_from(shift) {
        Ok(zeros) => (format!("{digits}{}", "0".repeat(zeros)), ""),
        Err(_) => {
            let at = usize::try_from(length.saturating_add(shift)).unwrap_or(0);
            (digits[..at].to_owned(), &digits[at..])
        }
    };
    let value = if kept.is_empty() { 0 } else { kept.parse().map_err(|_| MoneyError::OutOfRange)? };
    Ok((if negative { -value } else { value }, rest.bytes().any(|digit| digit != b'0')))
}

/// Fits 128 bits with room for every product that is made of it.
const MAX_DIGITS: i64 = 30;

fn parse_exponent(text: &str) -> Result<i64, MoneyError> {
    let (negative, digits) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(MoneyError::NotADecimal);
    }
    let value: i64 = digits.parse().map_err(|_| MoneyError::OutOfRange)?;
    Ok(if negative { -value } else { value })
}

fn decimal_6(scaled: i128) -> String {
    decimal(scaled, 6)
}

/// `scaled / 10^places` without trailing zeros.
fn decimal(scaled: i128, places: u32) -> String {
    let unit = 10i128.pow(places);
    let sign = if scaled < 0 { "-" } else { "" };
    let (whole, fraction) = (scaled.abs() / unit, scaled.abs() % unit);
    if fraction == 0 {
        return format!("{sign}{whole}");
    }
    let digits = format!("{fraction:0width$}", width = places as usize);
    format!("{sign}{whole}.{}", digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_contracts_vector() {
        let prompt = UnitPrice::parse_usd_per_million("0.15").unwrap().times(20).unwrap();
        let completion = UnitPrice::parse_usd_per_million("0.60").unwrap().times(9).unwrap();
        let cost = prompt.checked_add(completion).unwrap();
        assert_eq!(cost, PicoUsd::new(8_400_000));
        assert_eq!(cost.charge(MarkupBps::new(2000)), Some(MicroUsdc::new(11)));
    }

    #[test]
    fn decimals_are_exact_or_refused() {
        assert_eq!(MicroUsdc::parse_usd("5"), Ok(MicroUsdc::new(5_000_000)));
        assert_eq!(MicroUsdc::parse_usd("0.000001"), Ok(MicroUsdc::new(1)));
        assert_eq!(MicroUsdc::parse_usd("-1.5"), Ok(MicroUsdc::new(-1_500_000)));
        for bad in ["", ".", "1.", ".5", "1e3", "+1", "1,0", " 1", "0x1", "NaN", "١"] {
            assert_eq!(MicroUsdc::parse_usd(bad), Err(MoneyError::NotADecimal), "{bad:?}");
        }
        assert_eq!(MicroUsdc::parse_usd("1.0000000"), Err(MoneyError::TooPrecise));
        assert_eq!(MicroUsdc::parse_usd("9999999999999999999"), Err(MoneyError::OutOfRange));
    }

    #[test]
    fn prices_show_as_configured_and_as_billed() {
        let price = UnitPrice::parse_usd_per_million("0.15").unwrap();
        assert_eq!(price.to_usd_per_million(), "0.15");
        assert_eq!(price.to_billed_usd_per_million(MarkupBps::new(2000)), "0.18");
        assert_eq!(price.to_billed_usd_per_million(MarkupBps::new(1)), "0.150015");
    }

    #[test]
    fn numbers_of_price_lists_are_read_exactly_or_refused() {
        let price = |text| UnitPrice::parse_usd(text).map(UnitPrice::get);
        assert_eq!(price("1.5e-07"), Ok(150_000));
        assert_eq!(price("0.00000015"), Ok(150_000));
        assert_eq!(price("15E-8"), Ok(150_000));
        assert_eq!(price("2e+0"), Ok(2_000_000_000_000));
        assert_eq!(price("0.0"), Ok(0));
        assert_eq!(price("0e999999"), Ok(0));
        assert_eq!(price("1.10e-12"), Err(MoneyError::FinerThanPico));
        assert_eq!(price("1.0000000000e-12"), Ok(1));
        assert_eq!(price("1e-13"), Err(MoneyError::FinerThanPico));
        assert_eq!(price("-1e-7"), Err(MoneyError::OutOfRange));
        assert_eq!(price("1e400"), Err(MoneyError::OutOfRange));
        assert_eq!(price("1e99999999999999999999"), Err(MoneyError::OutOfRange));
        for bad in ["", "-", "e5", "1e", "1e+", ".5", "5.", "NaN", "Infinity", "1_0", " 1", "1e1.5", "0x1"] {
            assert_eq!(price(bad), Err(MoneyError::NotADecimal), "{bad:?}");
        }
        let per_second = |text| UnitPrice::parse_usd_per(1000, text).map(UnitPrice::get);
        assert_eq!(per_second("0.0001"), Ok(100_000));
        assert_eq!(per_second("0.0000000001"), Err(MoneyError::FinerThanPico));
        assert_eq!(UnitPrice::new(100_000).to_usd_per(1000), "0.0001");
        assert_eq!(UnitPrice::new(40_000_000_000).to_billed_usd_per(1, MarkupBps::new(2000)), "0.048");
        assert_eq!(PicoUsd::parse_usd_rounded_up("1.23456789012345e-4"), Ok(PicoUsd::new(123_456_790)));
        assert_eq!(PicoUsd::parse_usd_rounded_up("0.95"), Ok(PicoUsd::new(950_000_000_000)));
    }

    proptest! {
        #[test]
        fn prices_round_trip(pico in 0i64..i64::MAX) {
            prop_assert_eq!(UnitPrice::parse_usd(&UnitPrice::new(pico).to_usd_per(1)), Ok(UnitPrice::new(pico)));
        }

        #[test]
        fn usd_text_round_trips(micro in any::<i64>()) {
            prop_assert_eq!(MicroUsdc::parse_usd(&MicroUsdc::new(micro).to_usd()), Ok(MicroUsdc::new(micro)));
        }

        /// A charge covers cost and markup, and by less than one micro-USDC.
        #[test]
        fn rounding_neither_loses_nor_makes_a_micro(pico in 0i128..1_000_000_000_000_000_000, bps in 0u32..100_000) {
            let charge = i128::from(PicoUsd::new(pico).charge(MarkupBps::new(bps)).unwrap().get());
            let exact = pico * i128::from(10_000 + bps);
            prop_assert!(charge * 10_000_000_000 >= exact);
            prop_assert!((charge - 1) * 10_000_000_000 < exact);
        }
    }
}
