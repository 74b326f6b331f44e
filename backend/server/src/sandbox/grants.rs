//! What a server needs, as far as its supervisor's command line says it.
//!
//! It is what the operator has said, and not what a server says of its parameters later: one that
//! was taken over could give the next one anything.

use super::Mode;
use crate::args::Config;
use channel::Sandbox;
use std::path::{Path, PathBuf};

/// IANA's port of NBD.
const NBD_PORT: u16 = 10809;

/// What a server of this configuration is given.
#[must_use]
pub fn of(config: &Config) -> Sandbox {
    let mut sandbox = Sandbox {
        enforces: config.sandbox == Mode::On,
        modules: config.domain_dirs.clone(),
        ..Sandbox::default()
    };
    if config.domain.contains('/') {
        let folder = Path::new(&config.domain).parent().filter(|path| !path.as_os_str().is_empty());
        sandbox.modules.extend(folder.map(Path::to_owned));
    }
    sandbox.reads_only = config.params.get("readonly") == Some("true");
    for (key, value) in config.params.iter() {
        if let Some((scheme, rest)) = value.split_once("://") {
            sandbox.connects = true;
            if !scheme.ends_with("+unix") {
                sandbox.ports.push(port(rest).unwrap_or(NBD_PORT));
            }
        } else if key == "path" || value.starts_with('/') {
            sandbox.files.push(PathBuf::from(value));
        }
    }
    sandbox
}

/// The port of a URI, behind its scheme.
fn port(rest: &str) -> Option<u16> {
    let authority = rest.split(['/', '?']).next()?;
    // The colons of an IPv6 address stand in brackets.
    let behind_host = authority.rsplit(']').next()?;
    behind_host.rsplit_once(':')?.1.parse().ok()
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
        let nothing = Sandbox { modules: vec!["/d".into()], ..Sandbox::default() };
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
    fn of_a_server_its_port_is_granted() {
        let ports = |uri: &str| granted(&format!("--domain nbd --param uri={uri}"));
        let reaches = |ports: &[u16]| Sandbox {
            modules: vec!["/d".into()],
            connects: true,
            ports: ports.to_vec(),
            ..Sandbox::default()
        };
        assert_eq!(ports("nbd://host:1234/x:9"), reaches(&[1234]));
        assert_eq!(ports("nbd://host/export"), reaches(&[10809]));
        assert_eq!(ports("nbd://[::1]:99"), reaches(&[99]));
        assert_eq!(ports("nbd://[::1]"), reaches(&[10809]));
        assert_eq!(ports("nbd+unix:///x?socket=/run/s"), reaches(&[]));
    }
}
