//! The bounce buffer: aligned memory of our own, for data that the kernel does not take from where the guest has it.
//!
//! Direct I/O wants aligned addresses and lengths of every piece, and a guest may use any. One per queue, whose memory is taken when a request first needs it:
//! most guests never do, and a queue is attached while a guest waits.

use domain_api::Buffer;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes moved at a time.
const CHUNK: usize = 256 << 10;
/// What the memory is aligned to: the most that `direct_alignment` asks for.
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

    pub(crate) fn read(&mut self, file: &File, offset: u64, buffer: &Buffer<'_>) -> io::Result<()> {
        let len = buffer.len();
        for at in (0..len).step_by(CHUNK) {
            let chunk = self.chunk(CHUNK.min(len - at));
            file.read_exact_at(chunk, offset + at as u64)?;
            buffer.copy_from_slice(at, chunk);
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, file: &File, offset: u64, buffer: &Buffer<'_>) -> io::Result<()> {
        let len = buffer.len();
        for at in (0..len).step_by(CHUNK) {
            let chunk = self.chunk(CHUNK.min(len - at));
            buffer.copy_to_slice(at, chunk);
            file.write_all_at(chunk, offset + at as u64)?;
        }
        Ok(())
    }

    pub(crate) fn write_zeros(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        self.chunk(usize::try_from(len).unwrap_or(CHUNK).min(CHUNK)).fill(0);
        let mut done = 0;
        while done < len {
            let chunk = self.chunk(usize::try_from(len - done).unwrap_or(CHUNK).min(CHUNK));
            file.write_all_at(chunk, offset + done)?;
            done += chunk.len() as u64;
        }
        Ok(())
    }
}
