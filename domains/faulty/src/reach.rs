//! What is outside of a disk, and whether it can be reached: `open:PATH`, `write:PATH`, `fork`,
//! `connect:HOST:PORT`, `connect:PATH`.
//!
//! The result is logged, and counted as `reached` or `refused`. A domain that does this is broken,
//! or was broken into; a host that confines its domains refuses it.

use domain_api::{DomainError, Host, Level};
use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::str::FromStr;

/// One thing to reach for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reach {
    Open(String),
    Write(String),
    Fork,
    Connect(String),
}

impl Reach {
    pub(crate) fn reach_out(&self, host: Host) {
        let (count, text) = match self.result() {
            Ok(()) => ("reached", "reached".to_owned()),
            Err(error) => ("refused", format!("refused: {error}")),
        };
        host.count(count, 1);
        host.log(Level::Warn, &format!("reach={self}: {text}"));
    }

    fn result(&self) -> io::Result<()> {
        match self {
            Self::Open(path) => File::open(path).map(drop),
            Self::Write(path) => {
                File::options().write(true).create(true).truncate(false).open(path).map(drop)
            }
            Self::Fork => Command::new("/bin/true").status().map(drop),
            Self::Connect(path) if path.starts_with('/') => UnixStream::connect(path).map(drop),
            Self::Connect(address) => TcpStream::connect(address).map(drop),
        }
    }
}

impl std::fmt::Display for Reach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Open(path) => write!(f, "open:{path}"),
            Self::Write(path) => write!(f, "write:{path}"),
            Self::Fork => f.write_str("fork"),
            Self::Connect(address) => write!(f, "connect:{address}"),
        }
    }
}

impl FromStr for Reach {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        let (what, to) = text.split_once(':').unwrap_or((text, ""));
        match (what, to) {
            ("fork", "") => Ok(Self::Fork),
            ("open", path) if !path.is_empty() => Ok(Self::Open(path.to_owned())),
            ("write", path) if !path.is_empty() => Ok(Self::Write(path.to_owned())),
            ("connect", to) if !to.is_empty() => Ok(Self::Connect(to.to_owned())),
            _ => Err(DomainError::new(format!(
                "parameter `reach` has `{text}`; it must be open:PATH, write:PATH, fork, \
                 connect:HOST:PORT or connect:PATH"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reached_for_is_said_as_it_was_read() {
        for text in ["open:/a:b", "write:x", "fork", "connect:h:1", "connect:/s"] {
            let reach: Reach = text.parse().unwrap();
            assert_eq!(reach.to_string(), text);
        }
        for text in ["", "open", "open:", "fork:x", "connect:", "exec:/x"] {
            assert!(text.parse::<Reach>().unwrap_err().to_string().contains("connect:HOST:PORT"));
        }
    }

    #[test]
    fn what_nothing_forbids_is_reached() {
        let here: Reach = "open:/proc/self/stat".parse().unwrap();
        assert!(here.result().is_ok() && Reach::Fork.result().is_ok());
        let nowhere: Reach = "open:/nonexistent".parse().unwrap();
        assert_eq!(nowhere.result().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
