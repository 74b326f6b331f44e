//! Who has made a module: signatures of minisign, which lie beside the module.
//!
//! What is verified is the sealed copy (`sealed`), which is what is loaded. The signature goes with
//! the copy, so that another process that is given it verifies it anew, with its own keys.
//!
//! Deliberately absent: what the signature's trusted comment says. A module names itself and its
//! version, and both are signed.

use crate::error::Error;
use crate::guard;
use minisign_verify::{Error as Verdict, PublicKey, Signature};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// What is appended to a module's name, as minisign does it.
const SUFFIX: &str = ".minisig";
/// Largest signature, or key, that is read. minisign's have some 400 bytes.
const LIMIT: u64 = 4096;

/// A public key of minisign: what it has signed may be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedKey {
    key: PublicKey,
    text: String,
}

impl TrustedKey {
    /// The key that `text` is, or that is in the file that it names.
    ///
    /// # Errors
    /// In a sentence: it is neither.
    pub fn read(text: &str) -> Result<Self, String> {
        match Self::parse(text) {
            Some(key) => Ok(key),
            None => Self::of_file(Path::new(text)).map_err(|why| {
                format!(
                    "--trusted-key {text}: {why}; give a public key of minisign, or a file that \
                     has one (minisign.pub)"
                )
            }),
        }
    }

    /// The key that `text` is, in base64.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let key = PublicKey::from_base64(text).ok()?;
        Some(Self { key, text: text.to_owned() })
    }

    /// What [`parse`](Self::parse) makes this key of.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    fn of_file(path: &Path) -> Result<Self, String> {
        let file =
            File::open(path).map_err(|error| format!("it is no key, and as a file: {error}"))?;
        let metadata = file.metadata().map_err(|error| error.to_string())?;
        if !metadata.is_file() {
            return Err("it is no regular file".to_owned());
        }
        guard::check(path, &metadata, true).map_err(|error| error.to_string())?;
        let text = bounded(file).map_err(|error| error.to_string())?;
        // The first line is a comment.
        let key = text.lines().nth(1).and_then(Self::parse);
        key.ok_or_else(|| "it has no public key in its second line".to_owned())
    }
}

/// The signature beside the module at `path`.
pub(crate) fn beside(path: &Path) -> Result<String, Error> {
    let mut name = OsString::from(path);
    name.push(SUFFIX);
    match crate::sealed::open(&PathBuf::from(name)) {
        Ok((file, _)) => bounded(file).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => Error::BadSignature("it is no text"),
            _ => Error::Unreadable(error),
        }),
        Err(Error::NoFile) => Err(Error::Unsigned),
        Err(Error::NotAFile(_) | Error::TooLarge { .. }) => {
            Err(Error::BadSignature("it is no small file"))
        }
        Err(error) => Err(error),
    }
}

/// The text of a small file.
fn bounded(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(LIMIT + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too large"));
    }
    Ok(text)
}

/// Whether one of `keys` has signed `bytes`.
pub(crate) fn verify(keys: &[TrustedKey], signature: &str, bytes: &[u8]) -> Result<(), Error> {
    let signature =
        Signature::decode(signature).map_err(|_| Error::BadSignature("minisign makes no such"))?;
    // Only a key that says it has made the signature looks at the bytes.
    let mut refusal = Error::Stranger;
    for trusted in keys {
        match trusted.key.verify(bytes, &signature, false) {
            Ok(()) => {
                // Not before it is verified: what it says is shown, and what it is, is relied on.
                let comment = crate::error::printable(signature.trusted_comment());
                log::debug!("signed with {}: {comment}", trusted.text);
                return Ok(());
            }
            Err(Verdict::UnexpectedKeyId) => {}
            Err(Verdict::InvalidSignature) => refusal = Error::Altered,
            Err(Verdict::UnexpectedAlgorithm) => {
                refusal = Error::BadSignature("it is of the kind before 2021 (minisign -l)");
            }
            Err(_) => refusal = Error::BadSignature("it is of a kind that is not known"),
        }
    }
    Err(refusal)
}
