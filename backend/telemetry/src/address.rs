//! Where metrics are to be had: a Unix socket, or a port that only this host reaches.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Address {
    /// A Unix socket's path.
    Path(PathBuf),
    /// A loopback address.
    Loopback(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Path(text.into()));
        }
        let named = text.strip_prefix("localhost:").and_then(|port| port.parse().ok());
        let named = named.map(|port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        match named.or_else(|| text.parse().ok()) {
            Some(address) if address.ip().is_loopback() => Ok(Self::Loopback(address)),
            Some(_) => Err(format!(
                "`{text}` can be reached from other hosts, and metrics are not protected; give a \
                 loopback address, such as 127.0.0.1:9101, or a Unix socket's path"
            )),
            None => Err(format!(
                "`{text}` is neither a Unix socket's path (with a `/`) nor a loopback address with \
                 a port, such as 127.0.0.1:9101 or [::1]:9101"
            )),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Loopback(address) => write!(f, "http://{address}/metrics"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_this_host_reaches_is_taken() {
        assert_eq!("./m".parse(), Ok(Address::Path("./m".into())));
        for (text, address) in [
            ("127.0.0.1:9101", "127.0.0.1:9101"),
            ("127.1.2.3:1", "127.1.2.3:1"),
            ("[::1]:0", "[::1]:0"),
            ("localhost:9101", "127.0.0.1:9101"),
        ] {
            assert_eq!(text.parse(), Ok(Address::Loopback(address.parse().unwrap())));
        }
        for text in ["0.0.0.0:9101", "[::]:9101", "192.0.2.1:1"] {
            let sentence = text.parse::<Address>().unwrap_err();
            assert!(sentence.contains("from other hosts"), "{sentence}");
        }
        for text in ["", "metrics", "9101", ":9101", "127.0.0.1", "localhost:x", "example.org:1"] {
            let sentence = text.parse::<Address>().unwrap_err();
            assert!(sentence.contains("such as 127.0.0.1:9101"), "{sentence}");
        }
    }
}
