//! Normalization statistics: the documented layouts of their file, and the checks of their numbers.

use std::{collections::BTreeMap, io::Read, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Largest size of a statistics file in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Widest state or action accepted.
const MAX_DIMS: usize = 1024;
/// Most asset ids or keys that an error lists.
const MAX_LISTED: usize = 12;
/// Names of an array of statistics: the name of this program and openpi, then `LeRobot`'s name.
const STATE: [&str; 2] = ["state", "observation.state"];
/// See [`STATE`].
const ACTIONS: [&str; 2] = ["actions", "action"];

/// Reason for rejecting statistics.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StatsError {
    /// The file cannot be read.
    #[error("failed to read the file: {0}")]
    Read(String),
    /// A file that is too large.
    #[error("found more than {MAX_FILE_BYTES} bytes, expected a file of statistics only")]
    TooLong,
    /// The text is not JSON.
    #[error("not JSON: {0}")]
    Json(String),
    /// No layout of statistics.
    #[error(
        "found {found}, expected `state` and `actions` (openpi), or `observation.state` and `action` (LeRobot), at the top, in \
         `norm_stats` or under one asset id"
    )]
    Layout {
        /// Keys of the file.
        found: String,
    },
    /// Statistics of several assets.
    #[error(
        "found statistics of the assets {found}, expected one asset: keep the entry of this robot and remove the others"
    )]
    Assets {
        /// Asset ids.
        found: String,
    },
    /// One array under two names.
    #[error("found both `{first}` and `{second}`, expected one of them")]
    TwoNames {
        /// This program's name.
        first: &'static str,
        /// `LeRobot`'s name.
        second: &'static str,
    },
    /// A key is missing.
    #[error("`{0}` is missing")]
    Missing(String),
    /// A value of another type.
    #[error("`{key}` is {found}, expected {expected}")]
    Type {
        /// Path of the value.
        key: String,
        /// Type found.
        found: &'static str,
        /// Type expected.
        expected: &'static str,
    },
    /// No dimension, or too many.
    #[error("`{key}` has {found} dimensions, expected 1 to {MAX_DIMS}")]
    Dimensions {
        /// Path of the array.
        key: String,
        /// Dimensions found.
        found: usize,
    },
    /// Arrays of different widths.
    #[error("`{key}` has {found} dimensions, but `mean` has {expected}")]
    Width {
        /// Path of the array.
        key: String,
        /// Dimensions found.
        found: usize,
        /// Dimensions of `mean`.
        expected: usize,
    },
    /// One quantile without the other.
    #[error("`{key}` has only one of `q01` and `q99`, expected both or neither")]
    OneQuantile {
        /// `state` or `actions`.
        key: &'static str,
    },
    /// A number that is not finite.
    #[error("`{key}[{index}]` is {found}, expected a finite number")]
    NotFinite {
        /// Path of the array.
        key: String,
        /// Dimension.
        index: usize,
        /// Value found.
        found: String,
    },
    /// A negative standard deviation.
    #[error("`{key}.std[{index}]` is {found}, expected at least 0: the file is damaged")]
    Negative {
        /// `state` or `actions`.
        key: &'static str,
        /// Dimension.
        index: usize,
        /// Value found.
        found: String,
    },
    /// Exchanged quantiles.
    #[error(
        "`{key}.q01[{index}]` is {low}, above `{key}.q99[{index}]` = {high}, expected `q01` below `q99`: the quantiles are exchanged"
    )]
    Order {
        /// `state` or `actions`.
        key: &'static str,
        /// Dimension.
        index: usize,
        /// 1 % quantile.
        low: String,
        /// 99 % quantile.
        high: String,
    },
}

/// Statistics of one array, per dimension; see [`NormStats`] for the checks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DimStats {
    /// Mean per dimension.
    pub mean: Vec<f64>,
    /// Standard deviation per dimension, at least 0.
    pub std: Vec<f64>,
    /// 1 % quantile; required for quantile normalization.
    pub q01: Option<Vec<f64>>,
    /// 99 % quantile; required for quantile normalization.
    pub q99: Option<Vec<f64>>,
}

impl DimStats {
    /// Returns the number of dimensions, padding included.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// Returns the number of dimensions without the zeros at the end, with which earlier openpi pads statistics to the model's width.
    pub fn used(&self) -> usize {
        let zero =
            |values: Option<&Vec<f64>>, index: usize| values.is_none_or(|v| v.get(index).is_none_or(|x| *x == 0.0));
        let padding = |index: &usize| {
            zero(Some(&self.mean), *index)
                && zero(Some(&self.std), *index)
                && zero(self.q01.as_ref(), *index)
                && zero(self.q99.as_ref(), *index)
        };
        self.width() - (0..self.width()).rev().take_while(padding).count()
    }

    fn check(&self, key: &'static str) -> Result<(), StatsError> {
        let width = self.width();
        if width == 0 || width > MAX_DIMS {
            return Err(StatsError::Dimensions {
                key: format!("{key}.mean"),
                found: width,
            });
        }
        if self.q01.is_some() != self.q99.is_some() {
            return Err(StatsError::OneQuantile { key });
        }
        let arrays = [
            ("mean", Some(&self.mean)),
            ("std", Some(&self.std)),
            ("q01", self.q01.as_ref()),
            ("q99", self.q99.as_ref()),
        ];
        for (field, values) in arrays.into_iter().filter_map(|(field, values)| Some((field, values?))) {
            let path = || format!("{key}.{field}");
            if values.len() != width {
                return Err(StatsError::Width {
                    key: path(),
                    found: values.len(),
                    expected: width,
                });
            }
            if let Some((index, value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
                return Err(StatsError::NotFinite {
                    key: path(),
                    index,
                    found: value.to_string(),
                });
            }
        }
        if let Some((index, value)) = self.std.iter().enumerate().find(|(_, v)| **v < 0.0) {
            return Err(StatsError::Negative {
                key,
                index,
                found: value.to_string(),
            });
        }
        let quantiles = self.q01.iter().flatten().zip(self.q99.iter().flatten());
        if let Some((index, (low, high))) = quantiles.enumerate().find(|(_, (low, high))| low > high) {
            return Err(StatsError::Order {
                key,
                index,
                low: low.to_string(),
                high: high.to_string(),
            });
        }
        Ok(())
    }
}

/// Statistics of state and actions.
///
/// Reading checks that all arrays of a side have one width of 1 to 1024 and finite numbers, that `std >= 0` and `q01 <= q99`, and
/// that both or neither of the quantiles are present.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawNormStats")]
pub struct NormStats {
    /// Statistics of the state.
    pub state: DimStats,
    /// Statistics of the actions.
    pub actions: DimStats,
}

/// Statistics as a manifest holds them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNormStats {
    state: RawStats,
    actions: RawStats,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStats {
    mean: Vec<f64>,
    std: Vec<f64>,
    q01: Option<Vec<f64>>,
    q99: Option<Vec<f64>>,
}

impl From<RawStats> for DimStats {
    fn from(raw: RawStats) -> Self {
        Self {
            mean: raw.mean,
            std: raw.std,
            q01: raw.q01,
            q99: raw.q99,
        }
    }
}

impl TryFrom<RawNormStats> for NormStats {
    type Error = StatsError;

    fn try_from(raw: RawNormStats) -> Result<Self, StatsError> {
        Self {
            state: raw.state.into(),
            actions: raw.actions.into(),
        }
        .checked()
    }
}

impl NormStats {
    /// Reads the text of a file and parses the text.
    pub(super) fn read(path: &Path) -> Result<Self, StatsError> {
        let file = std::fs::File::open(path).map_err(|e| StatsError::Read(e.to_string()))?;
        let mut text = String::new();
        file.take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|e| StatsError::Read(e.to_string()))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(StatsError::TooLong);
        }
        Self::from_json(&text)
    }

    /// Parses the text of a statistics file.
    ///
    /// `state` and `actions` (openpi), or `observation.state` and `action` (`meta/stats.json` of `LeRobot`), each with `mean`, `std`, `q01`
    /// and `q99`, lie at the top, in `norm_stats` or under one asset id. Further keys are ignored.
    ///
    /// # Errors
    /// Another layout, or numbers that fail the checks of [`NormStats`].
    pub fn from_json(text: &str) -> Result<Self, StatsError> {
        let root: Value = serde_json::from_str(&quote_not_finite(text)).map_err(|e| StatsError::Json(e.to_string()))?;
        let Value::Object(root) = root else {
            return Err(StatsError::Layout {
                found: kind(&root).to_owned(),
            });
        };
        let object = find(&root)?;
        Self {
            state: dim_stats(object, STATE)?,
            actions: dim_stats(object, ACTIONS)?,
        }
        .checked()
    }

    fn checked(self) -> Result<Self, StatsError> {
        self.state.check("state")?;
        self.actions.check("actions")?;
        Ok(self)
    }
}

/// Writes numbers that JSON does not have (`NaN`, `Infinity`, `1e999`) as texts, so that the dimension can be named.
fn quote_not_finite(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut inside) = (text, false);
    while let Some(c) = rest.chars().next() {
        let bare = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        let end = rest.find(|c| !bare(c)).unwrap_or(rest.len());
        let taken = match c {
            '\\' if inside => rest.char_indices().nth(2).map_or(rest.len(), |(at, _)| at),
            _ if inside || end == 0 => c.len_utf8(),
            _ => end,
        };
        inside ^= c == '"';
        let (token, after) = rest.split_at(taken);
        if !inside && end > 0 && token.parse::<f64>().is_ok_and(|number| !number.is_finite()) {
            out.extend(["\"", token, "\""]);
        } else {
            out.push_str(token);
        }
        rest = after;
    }
    out
}

/// Returns the object with the arrays of state and actions.
fn find(root: &Map<String, Value>) -> Result<&Map<String, Value>, StatsError> {
    if has_array(root) {
        return Ok(root);
    }
    let inner = match root.get("norm_stats") {
        None => root,
        Some(Value::Object(inner)) => inner,
        Some(other) => {
            return Err(StatsError::Type {
                key: "norm_stats".to_owned(),
                found: kind(other),
                expected: "an object",
            });
        }
    };
    if has_array(inner) {
        return Ok(inner);
    }
    let assets: BTreeMap<&str, &Map<String, Value>> = inner
        .iter()
        .filter_map(|(id, value)| Some((id.as_str(), asset(value)?)))
        .collect();
    match assets.len() {
        0 => Err(StatsError::Layout {
            found: format!("the keys {}", listed(inner.keys().map(String::as_str))),
        }),
        1 => assets
            .into_values()
            .next()
            .ok_or(StatsError::Layout { found: String::new() }),
        _ => Err(StatsError::Assets {
            found: listed(assets.into_keys()),
        }),
    }
}

/// Returns the statistics below an asset id; `None` for a value without statistics.
fn asset(value: &Value) -> Option<&Map<String, Value>> {
    let object = value.as_object()?;
    [Some(object), object.get("norm_stats").and_then(Value::as_object)]
        .into_iter()
        .flatten()
        .find(|object| has_array(object))
}

fn has_array(object: &Map<String, Value>) -> bool {
    STATE.iter().chain(&ACTIONS).any(|name| {
        object
            .get(*name)
            .is_some_and(|value| value.get("mean").is_some() || value.get("std").is_some())
    })
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let shown: Vec<String> = names
        .iter()
        .take(MAX_LISTED)
        .map(|name| format!("`{}`", crate::message::shown(name, 60)))
        .collect();
    let more = names.len() - shown.len();
    match (shown.len(), more) {
        (0, _) => "(none)".to_owned(),
        (_, 0) => shown.join(", "),
        _ => format!("{} and {more} more", shown.join(", ")),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn dim_stats(object: &Map<String, Value>, [key, lerobot]: [&'static str; 2]) -> Result<DimStats, StatsError> {
    let array = match (object.get(key), object.get(lerobot)) {
        (Some(_), Some(_)) => {
            return Err(StatsError::TwoNames {
                first: key,
                second: lerobot,
            });
        }
        (Some(value), None) | (None, Some(value)) => value,
        (None, None) => return Err(StatsError::Missing(key.to_owned())),
    };
    let Value::Object(array) = array else {
        return Err(StatsError::Type {
            key: key.to_owned(),
            found: kind(array),
            expected: "an object with `mean` and `std`",
        });
    };
    let optional = |field: &str| match array.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => numbers(format!("{key}.{field}"), value).map(Some),
    };
    let required = |field: &str| optional(field)?.ok_or_else(|| StatsError::Missing(format!("{key}.{field}")));
    Ok(DimStats {
        mean: required("mean")?,
        std: required("std")?,
        q01: optional("q01")?,
        q99: optional("q99")?,
    })
}

fn numbers(key: String, value: &Value) -> Result<Vec<f64>, StatsError> {
    let Value::Array(values) = value else {
        return Err(StatsError::Type {
            key,
            found: kind(value),
            expected: "a list of numbers, one for each dimension",
        });
    };
    if values.len() > MAX_DIMS {
        return Err(StatsError::Dimensions {
            key,
            found: values.len(),
        });
    }
    values
        .iter()
        .enumerate()
        .map(|(index, value)| match value {
            Value::Number(number) => number.as_f64().ok_or_else(|| StatsError::NotFinite {
                key: key.clone(),
                index,
                found: number.to_string(),
            }),
            Value::Null => Err(StatsError::NotFinite {
                key: key.clone(),
                index,
                found: "null".to_owned(),
            }),
            Value::String(text) if text.parse::<f64>().is_ok_and(|number| !number.is_finite()) => {
                Err(StatsError::NotFinite {
                    key: key.clone(),
                    index,
                    found: text.clone(),
                })
            }
            other => Err(StatsError::Type {
                key: format!("{key}[{index}]"),
                found: kind(other),
                expected: "a number",
            }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"norm_stats": {
        "state": {"mean": [0, 1], "std": [1, 2], "q01": [-1, -2], "q99": [1, 2]},
        "actions": {"mean": [0], "std": [1], "q01": null, "q99": null}}}"#;

    #[test]
    fn bad_numbers_are_named_by_array_and_dimension() {
        let stats = NormStats::from_json(GOOD).expect("valid");
        assert_eq!(stats.state.std, [1.0, 2.0]);
        assert_eq!(stats.actions.q01, None);
        let text = serde_json::to_string(&stats).expect("serializes");
        assert_eq!(serde_json::from_str::<NormStats>(&text).expect("round trip"), stats);
        let state = "[-1, -2], \"q99\"";
        for (from, to, reason) in [
            (
                "[1, 2], \"q01\"",
                "[1], \"q01\"",
                "`state.std` has 1 dimensions, but `mean` has 2",
            ),
            (
                "[1, 2], \"q01\"",
                "[1, -2], \"q01\"",
                "`state.std[1]` is -2, expected at least 0",
            ),
            ("\"q01\": [-1, -2], ", "", "`state` has only one of `q01` and `q99`"),
            ("[0, 1]", "[]", "`state.mean` has 0 dimensions"),
            ("[0, 1]", "[0, 1e999]", "`state.mean[1]` is 1e999"),
            ("[0, 1]", "[NaN, 1]", "`state.mean[0]` is NaN"),
            ("[0, 1]", "[0, null]", "`state.mean[1]` is null"),
            (state, "[-1, -Infinity], \"q99\"", "`state.q01[1]` is -Infinity"),
            (
                state,
                "[-1, 3], \"q99\"",
                "`state.q01[1]` is 3, above `state.q99[1]` = 2",
            ),
            ("\"mean\": [0],", "\"mean\": [NaN],", "`actions.mean[0]` is NaN"),
            ("\"std\": [1, 2]", "\"sdt\": [1, 2]", "`state.std` is missing"),
            (
                "\"mean\": [0],",
                "\"mean\": 0,",
                "`actions.mean` is a number, expected a list",
            ),
            (
                "\"mean\": [0],",
                "\"mean\": [[0]],",
                "`actions.mean[0]` is a list, expected a number",
            ),
            ("\"actions\"", "\"acts\"", "`actions` is missing"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let error = NormStats::from_json(&GOOD.replacen(from, to, 1))
                .expect_err(reason)
                .to_string();
            assert!(error.contains(reason), "{error} does not say {reason}");
        }
        let manifest = text.replacen("[1.0,2.0]", "[1.0,-2.0]", 1);
        let error = serde_json::from_str::<NormStats>(&manifest)
            .expect_err("negative")
            .to_string();
        assert!(error.contains("`state.std[1]` is -2"), "{error}");
    }

    #[test]
    fn every_documented_layout_is_read() {
        let arrays = |state: &str, actions: &str| {
            format!(
                r#"{{"{state}": {{"mean": [0.5], "std": [1], "min": [-9], "max": [9], "count": [70], "q01": [0], "q50": [0.5], "q99": [1]}},
                    "observation.images.top": {{"mean": [[[0.5]], [[0.5]], [[0.5]]]}},
                    "{actions}": {{"mean": [2, 3], "std": [1, 1], "q01": [0, 0], "q99": [1, 1], "mask": [true, false]}}}}"#
            )
        };
        for inner in [arrays("state", "actions"), arrays("observation.state", "action")] {
            for text in [
                inner.clone(),
                format!(r#"{{"norm_stats": {inner}}}"#),
                format!(r#"{{"norm_stats": {{"physical-intelligence/libero": {inner}}}}}"#),
                format!(r#"{{"droid": {{"norm_stats": {inner}}}, "version": 3}}"#),
                format!(r#"{{"droid": {inner}}}"#),
            ] {
                let stats = NormStats::from_json(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
                assert_eq!(
                    (stats.state.mean, stats.actions.mean),
                    (vec![0.5], vec![2.0, 3.0]),
                    "{text}"
                );
            }
            let two = format!(r#"{{"norm_stats": {{"aloha": {inner}, "droid": {inner}}}}}"#);
            let error = NormStats::from_json(&two).expect_err("which of the two").to_string();
            assert!(error.contains("`aloha`, `droid`"), "{error}");
        }
        for (text, reason) in [
            ("[]", "found a list"),
            ("{}", "found the keys (none)"),
            ("{\"a\": 1, \"b\": {}}", "the keys `a`, `b`"),
            ("{\"norm_stats\": 7}", "`norm_stats` is a number"),
            ("{\"state\": ", "not JSON"),
            (
                r#"{"state": {"mean": [0], "std": [1]}, "observation.state": {"mean": [0], "std": [1]}, "action": 1}"#,
                "both `state` and `observation.state`",
            ),
            (
                r#"{"state": {"mean": [0], "std": [1]}, "action": 1}"#,
                "`actions` is a number",
            ),
        ] {
            let error = NormStats::from_json(text).expect_err(reason).to_string();
            assert!(error.contains(reason), "{error} does not say {reason}");
        }
    }

    #[test]
    fn only_numbers_outside_of_texts_are_quoted() {
        for (text, quoted) in [
            (r#"{"NaN": [NaN, -1.5e3]}"#, r#"{"NaN": ["NaN", -1.5e3]}"#),
            (r#"["a \" NaN", Infinity]"#, r#"["a \" NaN", "Infinity"]"#),
            (r#"["é\\", NaN]"#, r#"["é\\", "NaN"]"#),
            ("[true, null, 1e999", "[true, null, \"1e999\""),
        ] {
            assert_eq!(quote_not_finite(text), quoted);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "[\\[\\]{}:,\"\\\\a-zN0-9.eéI+-]{0,80}") {
            let _any = NormStats::from_json(&text);
        }
    }
}
