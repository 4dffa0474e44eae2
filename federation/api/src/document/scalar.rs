//! What a plain scalar means to Kubernetes' decoder: the scalars of YAML 1.1 as go-yaml resolves them, and the way of a number
//! through JSON. Sexagesimals and timestamps are text.

use serde_json::{Number, Value};

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scalar<'a> {
    Null,
    Bool(bool),
    Int(i64),
    /// Above the largest [`Scalar::Int`].
    UInt(u64),
    /// Neither of both; maybe infinite, or not a number.
    Float(f64),
    Text(&'a str),
}

pub fn resolve(text: &str) -> Scalar<'_> {
    match text.as_bytes().first() {
        None => Scalar::Null,
        Some(b'y' | b'Y' | b'n' | b'N' | b't' | b'T' | b'f' | b'F' | b'o' | b'O' | b'~') => word(text),
        Some(b'0'..=b'9' | b'+' | b'-' | b'.') => number(text),
        Some(_) => Scalar::Text(text),
    }
}

fn word(text: &str) -> Scalar<'_> {
    match text {
        "~" | "null" | "Null" | "NULL" => Scalar::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => Scalar::Bool(true),
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => Scalar::Bool(false),
        _ => Scalar::Text(text),
    }
}

fn number(text: &str) -> Scalar<'_> {
    match text {
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => return Scalar::Float(f64::INFINITY),
        "-.inf" | "-.Inf" | "-.INF" => return Scalar::Float(f64::NEG_INFINITY),
        ".nan" | ".NaN" | ".NAN" => return Scalar::Float(f64::NAN),
        _ => {}
    }
    // Anywhere; but after a point as a first character only between digits.
    let without;
    let is_point = text.starts_with('.');
    let digits = if text.contains('_') && (!is_point || are_between_digits(text)) {
        without = text.replace('_', "");
        without.as_str()
    } else {
        text
    };
    if !is_point && let Some(number) = integer(digits) {
        return number;
    }
    if is_float(digits)
        && let Ok(number) = digits.parse::<f64>()
        && number.is_finite()
    {
        return Scalar::Float(number);
    }
    Scalar::Text(text)
}

fn are_between_digits(text: &str) -> bool {
    let bytes = text.as_bytes();
    let is_digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_digit);
    text.match_indices('_').all(|(at, _)| is_digit(at.checked_sub(1)) && is_digit(Some(at + 1)))
}

/// Decimal, or with one of the prefixes of Go's literals; a leading zero means octal.
fn integer(text: &str) -> Option<Scalar<'static>> {
    let (sign, digits) = match text.as_bytes() {
        [b'-', ..] => ("-", &text[1..]),
        [b'+', ..] => ("+", &text[1..]),
        _ => ("", text),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', b'o' | b'O', ..] => (8, &digits[2..]),
        [b'0', b'b' | b'B', ..] => (2, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    if !digits.bytes().next()?.is_ascii_alphanumeric() {
        return None;
    }
    let magnitude = u64::from_str_radix(digits, radix).ok()?;
    match (sign, i64::try_from(magnitude)) {
        ("-", _) => Some(Scalar::Int(0_i64.checked_sub_unsigned(magnitude)?)),
        (_, Ok(number)) => Some(Scalar::Int(number)),
        ("", Err(_)) => Some(Scalar::UInt(magnitude)),
        (_, Err(_)) => None,
    }
}

/// `[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`
fn is_float(text: &str) -> bool {
    fn digits(text: &str) -> &str {
        text.trim_start_matches(|it: char| it.is_ascii_digit())
    }
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let whole = digits(text);
    let rest = match whole.strip_prefix('.') {
        Some(fraction) if whole.len() == text.len() && digits(fraction).len() == fraction.len() => return false,
        Some(fraction) => digits(fraction),
        None if whole.len() == text.len() => return false,
        None => whole,
    };
    match rest.strip_prefix(['e', 'E']) {
        None => rest.is_empty(),
        Some(exponent) => {
            let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            !exponent.is_empty() && digits(exponent).is_empty()
        }
    }
}

impl Scalar<'_> {
    /// As it arrives after JSON, where a whole number is written without a fraction: `80.0` and `8e1` are the integer 80.
    pub fn through_json(self) -> Self {
        /// Larger ones are written with an exponent.
        const MAX_WRITTEN_OUT: f64 = 1e21;
        match self {
            Self::Float(number) if number.fract() == 0.0 && number.abs() < MAX_WRITTEN_OUT => {
                let written = format!("{number}");
                let int = written.parse().map(Scalar::Int);
                int.or_else(|_| written.parse().map(Scalar::UInt)).unwrap_or(self)
            }
            other => other,
        }
    }

    pub fn to_value(self) -> Value {
        match self.through_json() {
            Self::Null => Value::Null,
            Self::Bool(it) => Value::Bool(it),
            Self::Int(it) => it.into(),
            Self::UInt(it) => it.into(),
            Self::Float(it) => Number::from_f64(it).map_or(Value::Null, Value::Number),
            Self::Text(it) => it.into(),
        }
    }

    /// As the key of a JSON object; `None` where it cannot be one.
    pub fn to_key(self) -> Option<String> {
        match self {
            Self::Null | Self::UInt(_) => None,
            Self::Bool(it) => Some(it.to_string()),
            Self::Int(it) => Some(it.to_string()),
            Self::Float(it) => Some(float_key(it as f32)),
            Self::Text(it) => Some(it.to_owned()),
        }
    }
}

/// Go's `%g` of 32 bits: the shortest digits, with an exponent where it is below -4 or above 5.
fn float_key(number: f32) -> String {
    if number.is_nan() {
        return ".nan".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { ".inf" } else { "-.inf" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..6).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    format!("{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scalars_are_those_of_kubernetes() {
        for (text, expected) in [
            ("", Scalar::Null),
            ("~", Scalar::Null),
            ("NULL", Scalar::Null),
            ("nULL", Scalar::Text("nULL")),
            ("y", Scalar::Bool(true)),
            ("On", Scalar::Bool(true)),
            ("off", Scalar::Bool(false)),
            ("yEs", Scalar::Text("yEs")),
            ("1_000", Scalar::Int(1000)),
            ("_1", Scalar::Text("_1")),
            ("0b1010000", Scalar::Int(80)),
            ("-0b11", Scalar::Int(-3)),
            ("0x1F", Scalar::Int(31)),
            ("0o17", Scalar::Int(15)),
            ("010", Scalar::Int(8)),
            ("-07", Scalar::Int(-7)),
            ("089", Scalar::Float(89.0)),
            ("0x", Scalar::Text("0x")),
            ("+-5", Scalar::Text("+-5")),
            ("--5", Scalar::Text("--5")),
            ("+5", Scalar::Int(5)),
            ("-9223372036854775808", Scalar::Int(i64::MIN)),
            ("18446744073709551615", Scalar::UInt(u64::MAX)),
            ("18446744073709551616", Scalar::Float(18_446_744_073_709_551_616.0)),
            ("1e3", Scalar::Float(1000.0)),
            ("1.", Scalar::Float(1.0)),
            (".5", Scalar::Float(0.5)),
            ("+.5e1", Scalar::Float(5.0)),
            (".1e1_0", Scalar::Float(1e9)),
            ("._5", Scalar::Text("._5")),
            (".", Scalar::Text(".")),
            ("-", Scalar::Text("-")),
            ("1e", Scalar::Text("1e")),
            ("1e400", Scalar::Text("1e400")),
            ("-.INF", Scalar::Float(f64::NEG_INFINITY)),
            ("190:20:30", Scalar::Text("190:20:30")),
            ("2001-12-14", Scalar::Text("2001-12-14")),
            ("1.2.3", Scalar::Text("1.2.3")),
            ("10.0.0.0/8", Scalar::Text("10.0.0.0/8")),
            ("é", Scalar::Text("é")),
        ] {
            assert_eq!(resolve(text), expected, "{text}");
        }
    }

    #[test]
    fn numbers_change_on_their_way_through_json() {
        for (text, expected) in [
            ("80.0", Scalar::Int(80)),
            ("8e1", Scalar::Int(80)),
            ("1e17", Scalar::Int(100_000_000_000_000_000)),
            ("1e19", Scalar::UInt(10_000_000_000_000_000_000)),
            ("1e20", Scalar::Float(1e20)),
            ("0.5", Scalar::Float(0.5)),
        ] {
            assert_eq!(resolve(text).through_json(), expected, "{text}");
        }
    }

    #[test]
    fn keys_are_text() {
        for (text, expected) in [
            ("on", Some("true")),
            ("0x10", Some("16")),
            ("1.5", Some("1.5")),
            ("1e3", Some("1000")),
            ("1e6", Some("1e+06")),
            ("100000.0", Some("100000")),
            ("1.5e-7", Some("1.5e-07")),
            ("0.0001", Some("0.0001")),
            ("123456789.0", Some("1.2345679e+08")),
            ("1234567.0", Some("1.234567e+06")),
            ("~", None),
            ("plain", Some("plain")),
        ] {
            assert_eq!(resolve(text).to_key().as_deref(), expected, "{text}");
        }
    }
}
