//! Where an export is: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`, as QEMU and
//! libnbd read them, refusing what these two read differently.
//!
//! One slash is taken off the path; what is left, unescaped, is the export's name, which may be
//! empty. In query and path `%XX` is unescaped and `+` stays.

use std::path::PathBuf;

/// IANA's port of NBD.
const PORT: u16 = 10809;
/// Longest name that servers must take (NBD protocol, "Values").
const LONGEST_NAME: usize = 4096;

/// An export of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// How the server is reached.
    pub server: Server,
    /// The export's name.
    pub export: String,
}

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host and a port.
    Tcp(String, u16),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { server, export } = self;
        match server {
            Server::Unix(path) => write!(f, "export `{export}` at `{}`", path.display()),
            Server::Tcp(host, port) => write!(f, "export `{export}` at {host} port {port}"),
        }
    }
}

impl Target {
    /// Reads a URI.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence that says what it should be.
    pub fn parse(uri: &str) -> Result<Self, String> {
        const FORMS: &str = "write nbd+unix:///EXPORT?socket=PATH or nbd://HOST:PORT/EXPORT";
        let wrong = |why: &str| Err(format!("`uri` is `{uri}`: {why}; {FORMS}"));
        if uri.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return wrong("a space or control character is written %20 and the like");
        }
        let Some((scheme, rest)) = uri.split_once("://") else {
            return wrong("it has no scheme");
        };
        let is_unix = match scheme {
            "nbd" => false,
            "nbd+unix" => true,
            "nbds" | "nbds+unix" => {
                return wrong("TLS is not supported, let `stunnel` or a tunnel of ssh do that");
            }
            _ => return wrong("this scheme is not known"),
        };
        if rest.contains('#') {
            return wrong("a fragment means nothing here, `#` in a name is written %23");
        }
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(a, b)| (a, Some(b)));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let Some(export) = unescape(path) else { return wrong("the name is not escaped well") };
        if export.len() > LONGEST_NAME {
            return wrong("the name is longer than NBD has them");
        }
        let mut socket = None;
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            match pair.split_once('=') {
                Some(("socket", path)) if socket.is_none() => match unescape(path) {
                    Some(path) if !path.is_empty() => socket = Some(path),
                    _ => return wrong("`socket` is no path"),
                },
                _ => return wrong("there is nothing to be asked for but `socket`, once"),
            }
        }
        let server = match (is_unix, socket) {
            (true, Some(_)) if !authority.is_empty() => {
                return wrong("a Unix socket is on no host");
            }
            (true, Some(socket)) => Server::Unix(PathBuf::from(socket)),
            (true, None) => return wrong("`socket` is missing"),
            (false, Some(_)) => return wrong("`socket` goes with nbd+unix"),
            (false, None) => match host_and_port(authority) {
                Some((host, port)) => Server::Tcp(host, port),
                None => return wrong("there is no host, or no port behind `:`"),
            },
        };
        Ok(Self { server, export })
    }

    /// A number for it, the same for the same target: device and inode of what is no file.
    #[must_use]
    pub fn id(&self) -> (u64, u64) {
        let server = match &self.server {
            Server::Unix(path) => path.display().to_string(),
            Server::Tcp(host, port) => format!("{host}:{port}"),
        };
        (fnv(server.as_bytes()), fnv(self.export.as_bytes()))
    }
}

fn host_and_port(authority: &str) -> Option<(String, u16)> {
    if authority.contains('@') {
        return None;
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let is_plain = authority.starts_with('[') || !host.contains(['[', ']', ':']);
    let port = port.map_or(Some(PORT), |port| port.parse().ok().filter(|port| *port > 0))?;
    (is_plain && !host.is_empty()).then(|| (host.to_owned(), port))
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            bytes.push((digit()? * 16 + digit()?) as u8);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// FNV-1a.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &str, export: &str) -> Target {
        Target { server: Server::Unix(path.into()), export: export.into() }
    }

    fn tcp(host: &str, port: u16, export: &str) -> Target {
        Target { server: Server::Tcp(host.into(), port), export: export.into() }
    }

    #[test]
    fn forms_that_others_read_are_read_alike() {
        for (uri, target) in [
            ("nbd+unix:///a%2Fb?socket=/dir/x%20y.sock", unix("/dir/x y.sock", "a/b")),
            ("nbd+unix:///?socket=S", unix("S", "")),
            ("nbd+unix://?socket=S", unix("S", "")),
            ("nbd+unix:///e/?socket=S", unix("S", "e/")),
            ("nbd+unix:////e?socket=S", unix("S", "/e")),
            ("nbd://[::1]/", tcp("::1", PORT, "")),
            ("nbd://[::1]:7/x", tcp("::1", 7, "x")),
            ("nbd://127.0.0.1", tcp("127.0.0.1", PORT, "")),
            ("nbd://h:10810/a+b%C3%A4", tcp("h", 10810, "a+bä")),
        ] {
            assert_eq!(Target::parse(uri), Ok(target), "{uri}");
        }
    }

    #[test]
    fn what_is_refused_is_refused_with_the_forms() {
        for uri in [
            "",
            "nbd+unix:///e",
            "nbd+unix://host/e?socket=S",
            "nbd+unix:///e?socket=S&x=1",
            "nbd+unix:///e?socket=",
            "nbd+unix:///e?socket=/x y",
            "nbd+unix:///e%2?socket=/x",
            "nbd+unix:///e%00?socket=/x",
            "nbd://127.0.0.1:/e",
            "nbd:///e",
            "nbd://::1/e",
            "nbd://h:0/e",
            "nbd://h:65536/e",
            "nbd://host/e?socket=S",
            "nbds://h/e",
            "nbd:unix:/path:exportname=x",
            "NBD://h/e",
            "nbd://user@h/e",
            "nbd://h/e#f",
        ] {
            let sentence = Target::parse(uri).expect_err(uri);
            assert!(sentence.contains("nbd+unix:///EXPORT?socket=PATH"), "{sentence}");
        }
        assert!(Target::parse("nbds://h/e").unwrap_err().contains("TLS"));
    }
}
