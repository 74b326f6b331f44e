//! Signs modules, as `minisign` does.

use std::fs::{self, File};
use std::io::Cursor;
use std::path::{Path, PathBuf};

use minisign::KeyPair;

use crate::daemon::module;

/// A pair of keys, for one test.
pub struct Signer {
    keys: KeyPair,
}

impl Default for Signer {
    fn default() -> Self {
        Self { keys: KeyPair::generate_unencrypted_keypair().expect("a pair of keys") }
    }
}

impl Signer {
    /// The public key, on one line.
    #[must_use]
    pub fn public(&self) -> String {
        self.keys.pk.to_base64()
    }

    /// Writes the public key as `minisign -G` does.
    pub fn write_public(&self, path: &Path) {
        let text = self.keys.pk.to_box().expect("a public key").to_string();
        fs::write(path, text).expect("a file");
    }

    /// The signature of these bytes.
    #[must_use]
    pub fn signature(&self, bytes: &[u8]) -> String {
        let made = minisign::sign(None, &self.keys.sk, Cursor::new(bytes), Some("of a test"), None);
        made.expect("a signature").into_string()
    }

    /// Signs a file, in a file beside it.
    pub fn sign(&self, path: &Path) {
        let bytes = fs::read(path).expect("a file to sign");
        fs::write(signature_of(path), self.signature(&bytes)).expect("a signature");
    }

    /// A signed copy of a domain's module; its path.
    #[must_use]
    pub fn signed(&self, domain: &str, directory: &Path) -> PathBuf {
        let path = unsigned(domain, directory);
        self.sign(&path);
        path
    }
}

/// A copy of a domain's module; its path.
#[must_use]
pub fn unsigned(domain: &str, directory: &Path) -> PathBuf {
    let path = directory.join(format!("libdomain_{domain}.so"));
    let mut from = File::open(module(domain)).expect("the module");
    // Not `fs::copy`: the mode is that of a new file.
    let mut to = File::create(&path).expect("a copy");
    std::io::copy(&mut from, &mut to).expect("a copy");
    path
}

/// Where a file's signature is.
#[must_use]
pub fn signature_of(path: &Path) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(".minisig");
    name.into()
}
