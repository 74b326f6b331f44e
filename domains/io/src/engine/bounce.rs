//! The bounce buffer: aligned memory of our own, for what a worker moves itself and the kernel does
//! not take from where the guest has it.
//!
//! Direct I/O wants aligned offsets, addresses and lengths of every piece, and a guest may use any.
//! One per queue, whose memory is taken when a request first needs it: most guests never do, and a
//! queue is attached while a guest waits. What goes through a port has memory of its own there
//! ([`Aligned`](crate::Aligned)).

use domain_api::Buffer;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes moved at a time.
const CHUNK: usize = 256 << 10;
/// What the memory is aligned to: the most that direct I/O asks for.
const ALIGN: usize = 4096;

/// Aligned memory for one request at a time.
#[derive(Debug, Default)]
pub struct Bounce {
    /// Empty until it is needed; then it never grows, so it never moves.
    memory: Vec<u8>,
    start: usize,
}

impl Bounce {
    fn chunk(&mut self, len: usize) -> &mut [u8] {
        if self.memory.is_empty() {
            self.memory = vec![0; CHUNK + ALIGN];
            self.start = self.memory.as_ptr().align_offset(ALIGN);
        }
        &mut self.memory[self.start..self.start + len]
    }

    /// Reads `buffer` from `offset` on, in blocks of `alignment` bytes.
    ///
    /// # Errors
    /// What `pread` says; [`io::ErrorKind::UnexpectedEof`] where the file ends too early.
    pub fn read(
        &mut self,
        file: &File,
        alignment: u64,
        offset: u64,
        buffer: &Buffer<'_>,
    ) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        for (at, len) in chunks(offset..end, alignment) {
            let chunk = self.chunk(len);
            let (from, to) = (at.max(offset), end.min(at + len as u64));
            // The file may end inside its last block.
            read_at_least(file, chunk, at, (to - at) as usize)?;
            buffer.copy_from_slice(
                (from - offset) as usize,
                &chunk[(from - at) as usize..(to - at) as usize],
            );
        }
        Ok(())
    }

    /// Writes `range`, in blocks of `alignment` bytes; what of these is outside stays as it is.
    /// `fill` is called with where in the range its bytes begin.
    ///
    /// # Errors
    /// What `pread` and `pwrite` say.
    pub fn write(
        &mut self,
        file: &File,
        alignment: u64,
        range: Range<u64>,
        fill: impl Fn(usize, &mut [u8]),
    ) -> io::Result<()> {
        for (at, len) in chunks(range.clone(), alignment) {
            let chunk = self.chunk(len);
            let (from, to) = (at.max(range.start), range.end.min(at + len as u64));
            if from > at || to < at + len as u64 {
                file.read_exact_at(chunk, at)?;
            }
            fill(
                (from - range.start) as usize,
                &mut chunk[(from - at) as usize..(to - at) as usize],
            );
            file.write_all_at(chunk, at)?;
        }
        Ok(())
    }
}

/// The blocks around `range` in pieces: where each begins, and its length.
fn chunks(range: Range<u64>, alignment: u64) -> impl Iterator<Item = (u64, usize)> {
    let (start, end) = (range.start / alignment * alignment, range.end.next_multiple_of(alignment));
    // A power of two, as alignments are, and no smaller than they come.
    let most = CHUNK as u64;
    (0..(end - start).div_ceil(most)).map(move |piece| {
        let at = start + piece * most;
        (at, most.min(end - at) as usize)
    })
}

/// Reads until `least` bytes are there.
fn read_at_least(file: &File, into: &mut [u8], offset: u64, least: usize) -> io::Result<()> {
    let mut done = 0;
    while done < least {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
