//! What can be wrong with a module: one enum inside, a stable code and a sentence outside.
//!
//! Each sentence says what is the case and, after a semicolon, what to do about it. Which module it
//! is about is said once, by [`Error::about`], so that the checks need not know where the bytes
//! come from.
//!
//! Text that comes out of a module is cut and escaped: it ends in logs and terminals.

use domain_abi::descriptor::DescriptorError;
use domain_host::LoadError;
use std::io;

/// The codes of all refusals. They do not change.
pub const CODES: [&str; 26] = [
    "module_not_found",
    "module_unreadable",
    "module_too_large",
    "module_not_sealed",
    "module_exposed",
    "module_swapped",
    "module_unsigned",
    "module_bad_signature",
    "module_untrusted",
    "module_altered",
    "module_not_elf",
    "module_malformed",
    "module_wrong_machine",
    "module_not_shared",
    "module_no_descriptor",
    "module_bad_descriptor",
    "module_no_entry",
    "module_wrong_abi",
    "module_wrong_class",
    "module_panic_abort",
    "module_search_path",
    "module_needs_library",
    "module_not_unloadable",
    "module_text_relocations",
    "module_executable_stack",
    "module_link_error",
];

/// Why there is no module to be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("there is none of this name in {dirs}; {choice}")]
    UnknownName { dirs: String, choice: String },
    #[error("there is no such file; give the path of a libdomain_*.so, or a name without `/`")]
    NoFile,
    #[error(
        "it cannot be opened or read; check its permissions and those of its directories, and with --sandbox=on that it lies below a --domain-dir"
    )]
    Unreadable(#[source] io::Error),
    #[error("it is {0}, not a regular file; give the path of a libdomain_*.so")]
    NotAFile(&'static str),
    #[error("it has {len} bytes, the limit is {limit}; strip its debug information")]
    TooLarge { len: u64, limit: u64 },
    #[error(
        "no sealed copy of it could be made in memory; check free memory, the limit of open files, and vm.memfd_noexec"
    )]
    NotSealed(#[source] io::Error),
    #[error("its bytes are not those that were kept; upgrade to the module anew")]
    OtherBytes,
    #[error(
        "{what} {why}, so it is not known who may put another module there; correct that (chown, chmod go-w)"
    )]
    Exposed { what: String, why: String },
    #[error(
        "it was exchanged or changed while it was checked; try again when nothing writes to it"
    )]
    Swapped,
    #[error(
        "it has no signature (MODULE.so.minisig), and the daemon was given --trusted-key; sign it with such a key: minisign -Sm MODULE.so"
    )]
    Unsigned,
    #[error("its signature cannot be used: {0}; sign it again with minisign 0.10 or later")]
    BadSignature(&'static str),
    #[error(
        "its signature was made with a key that the daemon does not trust; sign it with one of --trusted-key"
    )]
    Stranger,
    #[error(
        "its bytes, or the signature, are not those that the trusted key has signed; copy both again, and find out what has changed them"
    )]
    Altered,
    #[error("it is empty; build it again")]
    Empty,
    #[error("it is not an ELF file; give the path of a libdomain_*.so")]
    NotElf,
    #[error(
        "it was built for {found}, this host is {}; build it for this host",
        std::env::consts::ARCH
    )]
    WrongMachine { found: String },
    #[error("it is an ELF file, but {0}, not a shared object; build it as a cdylib")]
    NotShared(&'static str),
    #[error("its ELF structure is cut off or inconsistent ({0}); copy or build it again")]
    Malformed(&'static str),
    #[error(
        "it has no section {}, so it is no domain; build it with export_domain! and the feature `module`",
        domain_abi::descriptor::SECTION
    )]
    NoDescriptor,
    // The sentence is the descriptor's own and complete, so it is not a source.
    #[error("{why}{}", remedy(.why))]
    Descriptor { why: DescriptorError },
    #[error("its table of functions {0}; rebuild it against this host's domain-abi")]
    WrongTable(&'static str),
    #[error(
        "it does not export `{}` as an object; build it with export_domain! and the feature `module`",
        domain_abi::ENTRY_SYMBOL
    )]
    NoEntry,
    #[error("it has a library search path ({0}); link it without -rpath")]
    SearchPath(&'static str),
    #[error(
        "it needs the library `{0}`, which is not on the allow-list; link that statically or do without"
    )]
    NeedsLibrary(String),
    #[error("it could never be unmapped ({0}); build it without that")]
    NotUnloadable(String),
    #[error("it has text relocations; build it with position-independent code (-fPIC)")]
    TextRelocations,
    #[error("it wants an executable stack; link it with -z noexecstack")]
    ExecutableStack,
    #[error("the dynamic linker refused it: {0}; link everything that it uses into it")]
    Link(String),
}

impl Error {
    /// The stable name of the refusal, one of [`CODES`].
    pub(crate) const fn code(&self) -> &'static str {
        match self {
            Self::UnknownName { .. } | Self::NoFile => "module_not_found",
            Self::Unreadable(_) | Self::NotAFile(_) | Self::OtherBytes => "module_unreadable",
            Self::TooLarge { .. } => "module_too_large",
            Self::NotSealed(_) => "module_not_sealed",
            Self::Exposed { .. } => "module_exposed",
            Self::Swapped => "module_swapped",
            Self::Unsigned => "module_unsigned",
            Self::BadSignature(_) => "module_bad_signature",
            Self::Stranger => "module_untrusted",
            Self::Altered => "module_altered",
            Self::Empty | Self::NotElf => "module_not_elf",
            Self::WrongMachine { .. } => "module_wrong_machine",
            Self::NotShared(_) => "module_not_shared",
            Self::Malformed(_) => "module_malformed",
            Self::NoDescriptor | Self::Descriptor { why: DescriptorError::Magic } => {
                "module_no_descriptor"
            }
            Self::WrongTable(_)
            | Self::Descriptor {
                why: DescriptorError::AbiVersion { .. } | DescriptorError::Size { .. },
            } => "module_wrong_abi",
            Self::Descriptor { why: DescriptorError::Class { .. } } => "module_wrong_class",
            Self::Descriptor { why: DescriptorError::PanicStrategy } => "module_panic_abort",
            Self::Descriptor { .. } => "module_bad_descriptor",
            Self::NoEntry => "module_no_entry",
            Self::SearchPath(_) => "module_search_path",
            Self::NeedsLibrary(_) => "module_needs_library",
            Self::NotUnloadable(_) => "module_not_unloadable",
            Self::TextRelocations => "module_text_relocations",
            Self::ExecutableStack => "module_executable_stack",
            Self::Link(_) => "module_link_error",
        }
    }

    /// The refusal of `what`, e.g. "module `/usr/lib/libdomain_file.so`".
    pub(crate) fn about(self, what: &str) -> LoadError {
        let mut message = format!("{what}: {self}");
        if let Some(source) = std::error::Error::source(&self) {
            message = format!("{message} ({source})");
        }
        LoadError { code: self.code(), message }
    }
}

/// What to do, where the descriptor's sentence only says what is the case.
const fn remedy(error: &DescriptorError) -> &'static str {
    match error {
        DescriptorError::Class { .. } => "; use a block domain",
        _ => "",
    }
}

/// `text` as it can be shown: escaped, and cut after 200 characters.
pub(crate) fn printable(text: &str) -> String {
    let mut shown: String = text.chars().take(200).flat_map(char::escape_debug).collect();
    if text.chars().nth(200).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_list_has_the_codes_that_there_are() {
        // A string that an arm of `code` ends with.
        let source = include_str!("error.rs");
        let code = source.split("const fn code(").nth(1).unwrap();
        let code = code.split("/// The refusal of").next().unwrap();
        let used: BTreeSet<&str> = code.split('"').skip(1).step_by(2).collect();
        assert_eq!(used, BTreeSet::from(CODES));
        assert_eq!(used.len(), CODES.len(), "a code is listed twice");
    }
}
