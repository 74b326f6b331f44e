//! What is outside of a disk, and whether it can be reached.
//!
//! | | |
//! |---|---|
//! | `open:PATH`, `write:PATH` | a file |
//! | `connect:HOST:PORT`, `connect:PATH` | a server |
//! | `datagram:PATH` | a socket of datagrams, from one of a pair |
//! | `command:PATH` | a daemon of ours, by its control socket |
//! | `limit:PID` | a process: its limits |
//! | `fork` | a process of its own |
//! | `ring` | the kernel, by io_uring |
//!
//! The result is logged, and counted as `reached` or `refused`. A domain that does this is broken,
//! or was broken into; a host that confines its domains refuses it.

use domain_api::{DomainError, Host, Level};
use domain_io::uring::Ring;
use rustix::process::{Pid, Resource, getrlimit, prlimit};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::str::FromStr;

/// One thing to reach for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reach {
    Open(String),
    Write(String),
    Fork,
    Connect(String),
    Datagram(String),
    Command(String),
    Limit(Pid),
    Ring,
}

const STATUS: &str = r#"{"jsonrpc":"2.0","id":1,"method":"status"}"#;

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
            Self::Datagram(path) => {
                UnixDatagram::pair().and_then(|(one, _other)| one.send_to(b"x", path)).map(drop)
            }
            Self::Command(path) => {
                let mut stream = BufReader::new(UnixStream::connect(path)?);
                // A daemon that has refused it may have closed it.
                let _ = writeln!(stream.get_mut(), "{STATUS}");
                let mut answer = String::new();
                stream.read_line(&mut answer)?;
                if answer.contains("\"result\"") { Ok(()) } else { Err(io::Error::other(answer)) }
            }
            Self::Limit(process) => {
                prlimit(Some(*process), Resource::Core, getrlimit(Resource::Core))?;
                Ok(())
            }
            Self::Ring => Ring::probe().map(drop),
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
            Self::Datagram(path) => write!(f, "datagram:{path}"),
            Self::Command(path) => write!(f, "command:{path}"),
            Self::Limit(process) => write!(f, "limit:{process}"),
            Self::Ring => f.write_str("ring"),
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
            ("datagram", path) if !path.is_empty() => Ok(Self::Datagram(path.to_owned())),
            ("command", path) if !path.is_empty() => Ok(Self::Command(path.to_owned())),
            ("limit", process) => {
                let process = process.parse().ok().and_then(Pid::from_raw);
                process.map(Self::Limit).ok_or_else(|| wrong(text))
            }
            ("ring", "") => Ok(Self::Ring),
            _ => Err(wrong(text)),
        }
    }
}

fn wrong(text: &str) -> DomainError {
    DomainError::new(format!(
        "parameter `reach` has `{text}`; it must be open:PATH, write:PATH, fork, ring, \
         connect:HOST:PORT, connect:PATH, datagram:PATH, command:PATH or limit:PID"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reached_for_is_said_as_it_was_read() {
        for text in [
            "open:/a:b",
            "write:x",
            "fork",
            "connect:h:1",
            "connect:/s",
            "datagram:/s",
            "command:/s",
            "limit:7",
            "ring",
        ] {
            let reach: Reach = text.parse().unwrap();
            assert_eq!(reach.to_string(), text);
        }
        for text in ["", "open", "open:", "fork:x", "connect:", "exec:/x", "limit:0", "ring:x"] {
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
