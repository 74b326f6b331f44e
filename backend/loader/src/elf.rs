//! An ELF file as the dynamic linker will see it, with every bound checked.
//!
//! Why not leave that to the linker: it trusts what it maps. It follows addresses and offsets
//! without looking, maps segments over each other if they are out of order, and touches pages
//! beyond the end of a truncated file, which is SIGBUS. Why program headers and not only sections:
//! the linker reads nothing else, so checks on sections alone would be checks of something that is
//! not used.
//!
//! Invariants: nothing here panics, whatever the bytes are, and the work is bounded by the file's
//! size and the two limits below, not by its square.
//!
//! Deliberately absent: what is allowed. That is `verify`.

use crate::error::Error;
use object::LittleEndian as LE;
use object::elf;
use object::pod;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};

pub(crate) type Segment = elf::ProgramHeader64<LE>;
pub(crate) type Section = elf::SectionHeader64<LE>;
pub(crate) type Symbol = elf::Sym64<LE>;

/// More than any linker makes; keeps hostile files from costing time.
const MAX_SEGMENTS: usize = 64;
/// As above.
const MAX_SECTIONS: usize = 4096;

#[cfg(target_arch = "x86_64")]
const MACHINE: elf::Machine = elf::EM_X86_64;
#[cfg(target_arch = "aarch64")]
const MACHINE: elf::Machine = elf::EM_AARCH64;

/// A 64-bit little-endian shared object for this machine.
#[derive(Debug)]
pub(crate) struct Image<'a> {
    bytes: &'a [u8],
    segments: &'a [Segment],
    sections: &'a [Section],
    section_names: &'a [u8],
}

impl<'a> Image<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        check_ident(bytes)?;
        let header =
            elf::FileHeader64::<LE>::parse(bytes).map_err(|_| Error::Malformed("file header"))?;
        let found = header.e_machine(LE);
        if found != MACHINE {
            return Err(Error::WrongMachine { found: machine_name(found) });
        }
        match header.e_type(LE) {
            elf::ET_DYN => {}
            elf::ET_EXEC => return Err(Error::NotShared("an executable")),
            elf::ET_REL => return Err(Error::NotShared("an object file")),
            elf::ET_CORE => return Err(Error::NotShared("a core dump")),
            _ => return Err(Error::NotShared("of an unknown type")),
        }
        let segments = header
            .program_headers(LE, bytes)
            .map_err(|_| Error::Malformed("program header table"))?;
        let sections = header
            .section_headers(LE, bytes)
            .map_err(|_| Error::Malformed("section header table"))?;
        if segments.len() > MAX_SEGMENTS || sections.len() > MAX_SECTIONS {
            return Err(Error::Malformed("too many segments or sections"));
        }
        let mut image = Self { bytes, segments, sections, section_names: &[] };
        image.check_segments()?;
        if sections.iter().any(|s| s.data(LE, bytes).is_err()) {
            return Err(Error::Malformed("a section lies outside of the file"));
        }
        if !sections.is_empty() {
            let at = header
                .section_strings_index(LE, bytes)
                .map_err(|_| Error::Malformed("section names"))?;
            let names = sections.get(at.0).ok_or(Error::Malformed("section names"))?;
            image.section_names =
                names.data(LE, bytes).map_err(|_| Error::Malformed("section names"))?;
        }
        Ok(image)
    }

    /// The segments must be where the linker can map them without going wrong.
    fn check_segments(&self) -> Result<(), Error> {
        let mut end = 0;
        for segment in self.segments {
            let (offset, in_file) = segment.file_range(LE);
            let file_end =
                offset.checked_add(in_file).ok_or(Error::Malformed("a segment's size"))?;
            if file_end > self.bytes.len() as u64 {
                return Err(Error::Malformed("a segment lies outside of the file"));
            }
            if segment.p_type(LE) != elf::PT_LOAD {
                continue;
            }
            let (start, in_memory) = (segment.p_vaddr(LE), segment.p_memsz(LE));
            if in_file > in_memory {
                return Err(Error::Malformed("a segment is larger in the file than in memory"));
            }
            if start < end {
                return Err(Error::Malformed("segments overlap or are out of order"));
            }
            end = start.checked_add(in_memory).ok_or(Error::Malformed("a segment's address"))?;
        }
        Ok(())
    }

    pub(crate) fn segments_of(
        &self,
        kind: elf::ProgramType,
    ) -> impl Iterator<Item = &'a Segment> + use<'a> {
        self.segments.iter().filter(move |s| s.p_type(LE) == kind)
    }

    /// The contents of all sections of that name.
    pub(crate) fn sections_named(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.sections
            .iter()
            .filter(move |s| text_is(self.section_names, s.sh_name(LE), name))
            .filter_map(|s| s.data(LE, self.bytes).ok())
    }

    /// What the file puts at `address`, if all of it comes from the file.
    pub(crate) fn at_address(&self, address: u64, len: u64) -> Option<&'a [u8]> {
        self.segments_of(elf::PT_LOAD)
            .find_map(|s| s.data_range(LE, self.bytes, address, len).ok().flatten())
    }

    /// The dynamic section, by the program header as the linker does it, up to its end mark.
    pub(crate) fn dynamic(&self) -> Result<Dynamic<'a>, Error> {
        let mut headers = self.segments_of(elf::PT_DYNAMIC);
        let (Some(header), None) = (headers.next(), headers.next()) else {
            return Err(Error::Malformed("there must be one dynamic segment"));
        };
        let bytes = self
            .at_address(header.p_vaddr(LE), header.p_filesz(LE))
            .ok_or(Error::Malformed("the dynamic segment is not loaded"))?;
        let entries: &[elf::Dyn64<LE>] = pod::slice_from_all_bytes(bytes)
            .map_err(|()| Error::Malformed("the dynamic segment"))?;
        let len = entries
            .iter()
            .position(|e| e.d_tag.get(LE) == elf::DT_NULL)
            .ok_or(Error::Malformed("the dynamic segment has no end"))?;
        let mut dynamic = Dynamic { entries: &entries[..len], strings: &[] };
        let strings = dynamic.one(elf::DT_STRTAB)?.zip(dynamic.one(elf::DT_STRSZ)?);
        if let Some((address, size)) = strings {
            dynamic.strings = self
                .at_address(address, size)
                .ok_or(Error::Malformed("the dynamic strings are not loaded"))?;
        }
        Ok(dynamic)
    }

    /// The dynamic symbols. Their number is known to the section headers only, which must agree
    /// about where they are.
    pub(crate) fn dynamic_symbols(&self, dynamic: &Dynamic<'a>) -> Result<&'a [Symbol], Error> {
        let address =
            dynamic.one(elf::DT_SYMTAB)?.ok_or(Error::Malformed("it has no dynamic symbols"))?;
        let mut sections = self.sections.iter().filter(|s| s.sh_type(LE) == elf::SHT_DYNSYM);
        let (Some(section), None) = (sections.next(), sections.next()) else {
            return Err(Error::Malformed("there must be one section of dynamic symbols"));
        };
        if section.sh_addr(LE) != address {
            return Err(Error::Malformed("two places of the dynamic symbols"));
        }
        let bytes = self
            .at_address(address, section.sh_size(LE))
            .ok_or(Error::Malformed("the dynamic symbols are not loaded"))?;
        pod::slice_from_all_bytes(bytes).map_err(|()| Error::Malformed("the dynamic symbols"))
    }

    /// The GNU build id, if there is a well-formed one.
    pub(crate) fn build_id(&self) -> Option<&'a [u8]> {
        for segment in self.segments_of(elf::PT_NOTE) {
            let Ok(Some(mut notes)) = segment.notes(LE, self.bytes) else { continue };
            while let Ok(Some(note)) = notes.next() {
                let is_id =
                    note.name() == elf::ELF_NOTE_GNU && note.n_type(LE) == elf::NT_GNU_BUILD_ID;
                if is_id && (1..=64).contains(&note.desc().len()) {
                    return Some(note.desc());
                }
            }
        }
        None
    }
}

/// The dynamic section's entries before the end mark.
#[derive(Debug)]
pub(crate) struct Dynamic<'a> {
    entries: &'a [elf::Dyn64<LE>],
    strings: &'a [u8],
}

impl<'a> Dynamic<'a> {
    /// The values of all entries with that tag.
    pub(crate) fn all(&self, tag: elf::DynamicTag) -> impl Iterator<Item = u64> + use<'a> {
        self.entries.iter().filter(move |e| e.d_tag.get(LE) == tag).map(|e| e.d_val.get(LE))
    }

    pub(crate) fn has(&self, tag: elf::DynamicTag) -> bool {
        self.all(tag).next().is_some()
    }

    /// The value of an entry that must not be there twice, since the linker would take either.
    fn one(&self, tag: elf::DynamicTag) -> Result<Option<u64>, Error> {
        let mut values = self.all(tag);
        match (values.next(), values.next()) {
            (_, Some(_)) => Err(Error::Malformed("a dynamic entry is there twice")),
            (value, None) => Ok(value),
        }
    }

    /// The dynamic string at `offset`.
    pub(crate) fn text(&self, offset: u64) -> Result<&'a [u8], Error> {
        let tail = usize::try_from(offset).ok().and_then(|at| self.strings.get(at..));
        let tail = tail.ok_or(Error::Malformed("a dynamic string is outside of its table"))?;
        let len = tail.iter().position(|&b| b == 0);
        len.map(|len| &tail[..len]).ok_or(Error::Malformed("a dynamic string has no end"))
    }

    /// Whether the symbol has that name. Compares only, and so never scans a long string.
    pub(crate) fn is_named(&self, symbol: &Symbol, name: &str) -> bool {
        text_is(self.strings, symbol.st_name.get(LE), name)
    }
}

fn text_is(strings: &[u8], offset: u32, wanted: &str) -> bool {
    let tail = usize::try_from(offset).ok().and_then(|at| strings.get(at..));
    tail.and_then(|t| t.strip_prefix(wanted.as_bytes()))
        .is_some_and(|rest| rest.first() == Some(&0))
}

fn check_ident(bytes: &[u8]) -> Result<(), Error> {
    if !bytes.starts_with(&elf::ELFMAG) {
        return Err(Error::NotElf);
    }
    match bytes.get(4..6) {
        Some([2, 1]) => Ok(()),
        Some([1, _]) => Err(Error::WrongMachine { found: "a 32-bit machine".to_owned() }),
        Some([2, 2]) => Err(Error::WrongMachine { found: "a big-endian machine".to_owned() }),
        _ => Err(Error::Malformed("file header")),
    }
}

fn machine_name(machine: elf::Machine) -> String {
    match machine {
        elf::EM_X86_64 => "x86_64".to_owned(),
        elf::EM_AARCH64 => "aarch64".to_owned(),
        elf::EM_RISCV => "riscv64".to_owned(),
        other => format!("ELF machine {}", other.0),
    }
}
