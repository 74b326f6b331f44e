//! What a server needs, as far as its supervisor's command line says it.
//!
//! It is what the operator has said, and not what a server says of its parameters later: one that
//! was taken over could give the next one anything.

use super::Mode;
use crate::args::Config;
use channel::Sandbox;
use std::ffi::OsString;
use std::net::IpAddr;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// IANA's port of NBD.
const NBD_PORT: u16 = 10809;

/// What a server of this configuration is given.
#[must_use]
pub fn of(config: &Config) -> Sandbox {
    let mut sandbox = Sandbox {
        enforces: config.sandbox == Mode::On,
        modules: config.domain_dirs.clone(),
        by_address: true,
        ..Sandbox::default()
    };
    if config.domain.contains('/') {
        let folder = Path::new(&config.domain).parent().filter(|path| !path.as_os_str().is_empty());
        sandbox.modules.extend(folder.map(Path::to_owned));
    }
    sandbox.reads_only = config.params.get("readonly") == Some("true");
    sandbox.rings = match config.params.get("aio") {
        Some("io_uring") => Some(true),
        Some("sync") => Some(false),
        _ => None,
    };
    for (key, value) in config.params.iter() {
        if let Some((scheme, rest)) = value.split_once("://") {
            sandbox.connects = true;
            if scheme.ends_with("+unix") {
                sandbox.sockets.extend(socket(rest));
            } else {
                sandbox.ports.push(port(rest).unwrap_or(NBD_PORT));
                sandbox.by_address &= is_address(rest);
            }
        } else if key == "path" || value.starts_with('/') {
            sandbox.files.push(PathBuf::from(value));
        }
    }
    sandbox
}

/// The host of a URI, and its port, behind its scheme.
fn host_and_port(rest: &str) -> (&str, Option<&str>) {
    let authority = rest.split(['/', '?']).next().unwrap_or(rest);
    // The colons of an IPv6 address stand in brackets.
    let (host, behind) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, behind)) => (host, behind),
        None => authority.split_at(authority.rfind(':').unwrap_or(authority.len())),
    };
    (host, behind.strip_prefix(':'))
}

fn port(rest: &str) -> Option<u16> {
    host_and_port(rest).1?.parse().ok()
}

/// Whether the host of a URI is an address, as far as the standard library reads them: no other
/// one is looked up without the C library.
fn is_address(rest: &str) -> bool {
    host_and_port(rest).0.parse::<IpAddr>().is_ok()
}

/// The socket of a URI, behind its scheme.
fn socket(rest: &str) -> Option<PathBuf> {
    let query = rest.split_once('?')?.1;
    let path = query.split('&').find_map(|pair| pair.strip_prefix("socket="))?;
    let mut bytes = Vec::with_capacity(path.len());
    let mut left = path.bytes();
    while let Some(byte) = left.next() {
        if byte == b'%' {
            let mut digit = || char::from(left.next()?).to_digit(16);
            bytes.push((digit()? * 16 + digit()?) as u8);
        } else {
            bytes.push(byte);
        }
    }
    Some(OsString::from_vec(bytes).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Invocation};

    fn granted(line: &str) -> Sandbox {
        let words = ["vhost-hotswap", "--socket-path", "s", "--domain-dir", "/d"];
        let invocation = Args::parse_from(words.into_iter().chain(line.split_whitespace()));
        match invocation {
            Ok(Invocation::Serve(config)) => of(&config),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn what_is_named_is_granted_and_nothing_else() {
        let nothing =
            Sandbox { modules: vec!["/d".into()], by_address: true, ..Sandbox::default() };
        assert_eq!(granted("--param size=64M --param serial=a"), nothing);
        let file = Sandbox { files: vec!["disk.img".into()], ..nothing.clone() };
        assert_eq!(granted("--blk-file disk.img"), file);
        assert_eq!(
            granted("--blk-file disk.img --read-only"),
            Sandbox { reads_only: true, ..file }
        );
        let here =
            |path: &str| Sandbox { modules: vec!["/d".into(), path.into()], ..nothing.clone() };
        assert_eq!(granted("--domain /m/n/x.so"), here("/m/n"));
        assert_eq!(granted("--domain ./x.so"), here("."));
        let other = Sandbox { files: vec!["/etc/ceph".into()], ..nothing.clone() };
        assert_eq!(granted("--domain x --param conf=/etc/ceph"), other);
    }

    #[test]
    fn rings_are_granted_as_they_are_asked_for() {
        let rings = |aio: &str| granted(&format!("--blk-file disk.img {aio}")).rings;
        assert_eq!(rings(""), None);
        assert_eq!(rings("--param aio=auto"), None);
        assert_eq!(rings("--param aio=io_uring"), Some(true));
        assert_eq!(rings("--param aio=sync"), Some(false));
    }

    #[test]
    fn of_a_server_its_port_is_granted_or_its_socket() {
        let uri = |uri: &str| granted(&format!("--domain nbd --param uri={uri}"));
        let reaches = |by_address, ports: &[u16]| Sandbox {
            modules: vec!["/d".into()],
            connects: true,
            ports: ports.to_vec(),
            by_address,
            ..Sandbox::default()
        };
        assert_eq!(uri("nbd://host:1234/x:9"), reaches(false, &[1234]));
        assert_eq!(uri("nbd://host/export"), reaches(false, &[10809]));
        assert_eq!(uri("nbd://127.0.0.1:7/[::1]"), reaches(true, &[7]));
        assert_eq!(uri("nbd://[::1]:99"), reaches(true, &[99]));
        assert_eq!(uri("nbd://[::1]"), reaches(true, &[10809]));
        assert!(uri("nbd://host").looks_names_up() && !uri("nbd://[::1]").looks_names_up());
        assert!(!uri("nbd://host").connects_to_paths());
        let unix = uri("nbd+unix:///x?socket=/run/a%20b/s");
        assert_eq!(unix, Sandbox { sockets: vec!["/run/a b/s".into()], ..reaches(true, &[]) });
        assert!(unix.connects_to_paths() && !unix.looks_names_up());
    }
}
