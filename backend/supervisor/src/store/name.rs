//! Names of entries. They are the only key: the order in which entries come back means nothing.

use std::fmt;

/// What the supervisor calls an entry. A number is given once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// An object of the vault.
    Object(u64),
    /// A record.
    Record(u64),
}

impl Name {
    /// A name of the supervisor's; any other is not.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (word, number) = text.rsplit_once('-')?;
        let number = number.parse().ok()?;
        let name = match word {
            "object" => Self::Object(number),
            "record" => Self::Record(number),
            _ => return None,
        };
        // One way to write each.
        (name.to_string() == text).then_some(name)
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u64 {
        match self {
            Self::Object(number) | Self::Record(number) => number,
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(number) => write!(f, "object-{number}"),
            Self::Record(number) => write!(f, "record-{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_written_in_one_way_and_others_are_foreign() {
        for name in [Name::Object(0), Name::Record(17), Name::Object(u64::MAX)] {
            assert_eq!(Name::parse(&name.to_string()), Some(name));
        }
        for foreign in ["", "stored", "object", "object-", "object-07", "object-+1", "record--1"] {
            assert_eq!(Name::parse(foreign), None, "{foreign}");
        }
    }
}
