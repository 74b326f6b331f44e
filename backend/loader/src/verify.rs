//! Which modules are allowed: the rules, on the bytes alone. What may be decided otherwise is in
//! the [`Policy`].
//!
//! Each rule is there for something that would go wrong later, when it could not be refused any
//! more: a missing library or an endless stay in memory would be noticed only after constructors
//! have run.
//!
//! Invariant: [`inspect`] is a function of the bytes and the policy. It opens nothing, maps
//! nothing, and never panics.

use crate::elf::{Dynamic, Image, Symbol};
use crate::error::{Error, printable};
use crate::policy::Policy;
use domain_abi::descriptor::{Description, SECTION};
use domain_abi::{ABI_VERSION, ENTRY_SYMBOL, ModuleVtable};
use object::LittleEndian as LE;
use object::elf;
use object::read::elf::ProgramHeader;

/// What is known of a module that may be loaded.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) description: Description,
    pub(crate) build_id: Option<&'a [u8]>,
}

/// Checks a module.
pub(crate) fn inspect<'a>(bytes: &'a [u8], policy: &Policy) -> Result<Facts<'a>, Error> {
    let image = Image::parse(bytes)?;
    let description = describe(&image)?;
    let dynamic = image.dynamic()?;
    check_dynamic(&dynamic, policy)?;
    check_stack(&image)?;
    let symbols = image.dynamic_symbols(&dynamic)?;
    // One reference to such a symbol makes the linker keep the module for ever.
    if symbols.iter().any(|s| s.st_bind() == elf::STB_GNU_UNIQUE) {
        return Err(Error::NotUnloadable(
            "it has unique symbols, see gcc's -fno-gnu-unique".to_owned(),
        ));
    }
    check_entry(&image, &dynamic, symbols)?;
    Ok(Facts { description, build_id: image.build_id() })
}

/// The descriptor. Before everything else about the module: it has the most helpful sentences.
fn describe(image: &Image<'_>) -> Result<Description, Error> {
    let mut sections = image.sections_named(SECTION);
    let section = sections.next().ok_or(Error::NoDescriptor)?;
    if sections.next().is_some() {
        return Err(Error::Malformed("it has two descriptors"));
    }
    Description::parse(section).map_err(|why| Error::Descriptor { why })
}

fn check_dynamic(dynamic: &Dynamic<'_>, policy: &Policy) -> Result<(), Error> {
    // A search path would let the directory that it names decide what runs here.
    for (tag, name) in [(elf::DT_RPATH, "DT_RPATH"), (elf::DT_RUNPATH, "DT_RUNPATH")] {
        if dynamic.has(tag) {
            return Err(Error::SearchPath(name));
        }
    }
    for offset in dynamic.all(elf::DT_NEEDED) {
        check_library(dynamic.text(offset)?, policy)?;
    }
    // Filters load further libraries, too, and no domain needs one.
    for tag in [elf::DT_FILTER, elf::DT_AUXILIARY] {
        if let Some(offset) = dynamic.all(tag).next() {
            return Err(Error::NeedsLibrary(shown(dynamic.text(offset)?)));
        }
    }
    // The linker goes by names: the next module that needs that library would get this one, and pin
    // it.
    for offset in dynamic.all(elf::DT_SONAME) {
        let name = dynamic.text(offset)?;
        if policy.allows(name) {
            return Err(Error::NotUnloadable(format!("its soname is that of `{}`", shown(name))));
        }
    }
    let flags = dynamic.all(elf::DT_FLAGS_1).fold(0, |all, one| all | one);
    if flags & elf::DF_1_NODELETE.0 != 0 {
        return Err(Error::NotUnloadable("it was linked with -z nodelete".to_owned()));
    }
    if flags & elf::DF_1_PIE.0 != 0 {
        return Err(Error::NotShared("a position-independent executable"));
    }
    let flags = dynamic.all(elf::DT_FLAGS).fold(0, |all, one| all | one);
    if dynamic.has(elf::DT_TEXTREL) || flags & elf::DF_TEXTREL.0 != 0 {
        return Err(Error::TextRelocations);
    }
    Ok(())
}

fn check_library(name: &[u8], policy: &Policy) -> Result<(), Error> {
    if policy.allows(name) { Ok(()) } else { Err(Error::NeedsLibrary(shown(name))) }
}

fn shown(text: &[u8]) -> String {
    // Cut before it is decoded: the text may be as long as the file.
    printable(&String::from_utf8_lossy(&text[..text.len().min(1000)]))
}

/// An executable stack would make every stack of this process executable. Without a header the
/// linker assumes one.
fn check_stack(image: &Image<'_>) -> Result<(), Error> {
    let mut headers = image.segments_of(elf::PT_GNU_STACK).peekable();
    let missing = headers.peek().is_none();
    if missing || headers.any(|s| s.p_flags(LE).0 & elf::PF_X.0 != 0) {
        return Err(Error::ExecutableStack);
    }
    Ok(())
}

/// The table must be an object in the file, large enough for what it says, so that the host can
/// read it after it is mapped.
fn check_entry(image: &Image<'_>, dynamic: &Dynamic<'_>, symbols: &[Symbol]) -> Result<(), Error> {
    let is_entry = |s: &&Symbol| {
        // Reserved numbers, e.g. of absolute symbols, are no places in the module.
        let section = s.st_shndx.get(LE);
        let exported = matches!(s.st_bind(), elf::STB_GLOBAL | elf::STB_WEAK);
        exported && section.index().is_some() && dynamic.is_named(s, ENTRY_SYMBOL)
    };
    let mut entries = symbols.iter().filter(is_entry);
    let (Some(entry), None) = (entries.next(), entries.next()) else { return Err(Error::NoEntry) };
    // An indirect function would be called by the lookup.
    if entry.st_type() != elf::STT_OBJECT {
        return Err(Error::NoEntry);
    }
    let (address, len) = (entry.st_value.get(LE), entry.st_size.get(LE));
    if len < ModuleVtable::FIRST_SIZE as u64 {
        return Err(Error::WrongTable("is shorter than the first that there was"));
    }
    if !address.is_multiple_of(align_of::<ModuleVtable>() as u64) {
        return Err(Error::Malformed("the table of functions is not aligned"));
    }
    let table = image
        .at_address(address, len)
        .ok_or(Error::Malformed("the table of functions is not in the file"))?;
    let word = |at: usize| {
        table.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    };
    let size = word(std::mem::offset_of!(ModuleVtable, size));
    if word(std::mem::offset_of!(ModuleVtable, abi_version)) != ABI_VERSION {
        return Err(Error::WrongTable("is of another ABI version"));
    }
    if (size as usize) < ModuleVtable::FIRST_SIZE || u64::from(size) > len {
        return Err(Error::WrongTable("has another size than it says"));
    }
    Ok(())
}
