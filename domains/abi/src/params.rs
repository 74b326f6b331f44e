//! A domain's parameters: `KEY=VALUE` pairs, and the forms that values take.

use std::collections::BTreeMap;

/// Parameters by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Params(BTreeMap<String, String>);

/// A parameter that cannot be used. The sentence names it and says what it should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParamsError {
    /// A pair without `=`, or without a key.
    #[error("`{0}` is no parameter; write KEY=VALUE")]
    NotAPair(String),
    /// The same key twice.
    #[error("parameter `{0}` is given twice; give it once")]
    Twice(String),
    /// A key that the domain does not take.
    #[error("unknown parameter `{key}`; this domain takes: {takes}")]
    Unknown {
        /// The key.
        key: String,
        /// The keys that there are.
        takes: String,
    },
    /// A value that cannot be read.
    #[error("parameter `{key}` is `{value}`; it must be {expected}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

impl Params {
    /// Reads `KEY=VALUE` texts.
    ///
    /// # Errors
    /// A text that is no pair, or a key that comes twice.
    pub fn from_pairs<S: AsRef<str>>(
        pairs: impl IntoIterator<Item = S>,
    ) -> Result<Self, ParamsError> {
        let mut params = Self::default();
        for pair in pairs {
            let pair = pair.as_ref();
            match pair.split_once('=') {
                Some((key, value)) if !key.is_empty() => {
                    if params.0.insert(key.to_owned(), value.to_owned()).is_some() {
                        return Err(ParamsError::Twice(key.to_owned()));
                    }
                }
                _ => return Err(ParamsError::NotAPair(pair.to_owned())),
            }
        }
        Ok(params)
    }

    /// The value of `key`, if it is given.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Sets `key`; returns its old value.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<String>) -> Option<String> {
        self.0.insert(key.into(), value.into())
    }

    /// All pairs, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// The size at `key` in bytes, or `default`.
    ///
    /// # Errors
    /// A value that is no size.
    pub fn size(&self, key: &str, default: u64) -> Result<u64, ParamsError> {
        self.get(key).map_or(Ok(default), |value| {
            parse_size(value).ok_or_else(|| {
                self.bad(key, value, "a number of bytes, with K, M, G or T for powers of 1024")
            })
        })
    }

    /// The truth at `key`, or `default`.
    ///
    /// # Errors
    /// Anything but `true` or `false`.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, ParamsError> {
        match self.get(key) {
            None => Ok(default),
            Some("true") => Ok(true),
            Some("false") => Ok(false),
            Some(value) => Err(self.bad(key, value, "true or false")),
        }
    }

    /// The serial number at key `serial`, or the empty one: at most 20 bytes of printable ASCII
    /// (virtio 1.2, 5.2.6).
    ///
    /// # Errors
    /// A longer or another text.
    pub fn serial(&self) -> Result<String, ParamsError> {
        let value = self.get("serial").unwrap_or("");
        if value.len() <= 20 && value.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
            Ok(value.to_owned())
        } else {
            Err(self.bad("serial", value, "at most 20 printable ASCII characters"))
        }
    }

    /// Checks that every key is one of `known`.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check_known<S: AsRef<str>>(&self, known: &[S]) -> Result<(), ParamsError> {
        match self.0.keys().find(|key| !known.iter().any(|k| k.as_ref() == key.as_str())) {
            None => Ok(()),
            Some(key) => Err(ParamsError::Unknown {
                key: key.clone(),
                takes: known.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Adds from `earlier` what `inherited` names and is not given here.
    pub fn inherit<S: AsRef<str>>(&mut self, earlier: &Self, inherited: &[S]) {
        for key in inherited {
            if let (None, Some(value)) = (self.get(key.as_ref()), earlier.get(key.as_ref())) {
                self.set(key.as_ref(), value);
            }
        }
    }

    fn bad(&self, key: &str, value: &str, expected: &'static str) -> ParamsError {
        ParamsError::Value { key: key.to_owned(), value: value.to_owned(), expected }
    }
}

/// Reads a size: a decimal number of bytes, with an optional suffix K, M, G or T (powers of 1024).
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("0"), Some(0));
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("64M"), Some(64 << 20));
        assert_eq!(parse_size("8G"), Some(8 << 30));
        assert_eq!(parse_size("2T"), Some(2 << 40));
        for bad in ["", "M", "-1", "+1", "1.5G", "64MB", "99999999999T", "0x10", "１"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn pairs_are_checked() {
        let params = Params::from_pairs(["size=1M", "path=/a=b"]).unwrap();
        assert_eq!(params.get("path"), Some("/a=b"));
        assert_eq!(params.size("size", 0), Ok(1 << 20));
        assert!(Params::from_pairs(["size"]).is_err());
        assert!(Params::from_pairs(["=1"]).is_err());
        assert!(Params::from_pairs(["a=1", "a=2"]).is_err());
        assert!(params.check_known(&["size"]).unwrap_err().to_string().contains("`path`"));
    }

    #[test]
    fn only_what_is_named_is_inherited() {
        let earlier = Params::from_pairs(["size=1M", "fault=request:panic"]).unwrap();
        let mut params = Params::from_pairs(["serial=x"]).unwrap();
        params.inherit(&earlier, &["size", "serial"]);
        assert_eq!(params, Params::from_pairs(["size=1M", "serial=x"]).unwrap());
    }
}
