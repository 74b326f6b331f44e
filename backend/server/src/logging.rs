//! The log: lines on standard error, of which none ever waits for its reader.
//!
//! What is said is often said under a lock: an upgrade's, a worker's. If standard error is a pipe
//! without a reader that reads, or a terminal that was stopped, a plain write would wait
//! there, and with it the upgrade, the next frontend and the daemon's end. So it is asked first
//! whether there is room. A line without room is lost, and how many were is said as soon as there
//! is some.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Write};
use std::os::fd::AsFd;

/// A pipe that can be written to takes this much without waiting (POSIX's `PIPE_BUF`, as Linux has
/// it).
const ROOM: usize = 4096;

/// How long a reader that is merely slow is waited for, once.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Starts logging, as `RUST_LOG` says, by default from `info` on. Panics are logged, too.
pub fn start() {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .target(env_logger::Target::Pipe(Box::new(NonBlockingWriter::new(io::stderr()))))
        .init();
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}

/// Writes what there is room for, and counts what there was none for. Takes whole lines.
struct NonBlockingWriter<W> {
    out: W,
    lost: u64,
    /// The last line was cut off.
    torn: bool,
}

impl<W: Write + AsFd> NonBlockingWriter<W> {
    const fn new(out: W) -> Self {
        Self { out, lost: 0, torn: false }
    }

    /// Writes all of it, or says `false`.
    fn put(&mut self, bytes: &[u8]) -> bool {
        for (index, piece) in bytes.chunks(ROOM).enumerate() {
            // A reader that did not take the last line is not waited for again.
            let patience =
                if self.lost == 0 { PATIENCE } else { Timespec { tv_sec: 0, tv_nsec: 0 } };
            let mut fds = [PollFd::new(&self.out, PollFlags::OUT)];
            let has_room = poll(&mut fds, Some(&patience)).is_ok_and(|ready| ready > 0);
            if !has_room || self.out.write_all(piece).is_err() {
                self.torn |= index > 0;
                return false;
            }
        }
        true
    }
}

impl<W: Write + AsFd> Write for NonBlockingWriter<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lost > 0 {
            let end = if self.torn { "\n" } else { "" };
            let notice =
                format!("{end}[{} lines of the log are lost: nobody read them]\n", self.lost);
            if self.put(notice.as_bytes()) {
                (self.lost, self.torn) = (0, false);
            }
        }
        if self.lost > 0 || !self.put(line) {
            self.lost += 1;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::time::{Duration, Instant};

    fn pipe() -> (File, NonBlockingWriter<File>) {
        let (reader, writer): (OwnedFd, OwnedFd) = {
            let (reader, writer) = io::pipe().unwrap();
            (reader.into(), writer.into())
        };
        (File::from(reader), NonBlockingWriter::new(File::from(writer)))
    }

    fn read(reader: &mut File, len: usize) -> String {
        let mut bytes = vec![0; len];
        reader.read_exact(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_that_are_not_read_are_counted_and_not_waited_for() {
        let (mut reader, mut log) = pipe();
        let line = [b'x'; 99].iter().copied().chain([b'\n']).collect::<Vec<_>>();
        let started = Instant::now();
        (0..10_000).for_each(|_| log.write_all(&line).unwrap());
        assert!(started.elapsed() < Duration::from_secs(5), "it waited: {:?}", started.elapsed());
        let written = 10_000 - log.lost;
        assert!((100..2000).contains(&written), "what a pipe holds is there: {written}");
        read(&mut reader, written as usize * 100);
        log.write_all(b"and on\n").unwrap();
        let notice =
            format!("[{} lines of the log are lost: nobody read them]\n", 10_000 - written);
        assert_eq!(read(&mut reader, notice.len()), notice);
        assert_eq!(read(&mut reader, 7), "and on\n");
    }

    #[test]
    fn a_line_that_is_cut_off_is_ended_before_the_next() {
        let (mut reader, mut log) = pipe();
        let line = [b'y'; 10 * ROOM];
        while log.lost == 0 {
            log.write_all(&line).unwrap();
        }
        assert!(log.torn, "the pipe's size is no multiple of the line's");
        // A pipe has room again when a page of it has been read.
        let mut taken = vec![0; 1 << 20];
        while !log.put(b"") || log.lost > 0 {
            assert!(reader.read(&mut taken).unwrap() > 0);
            log.write_all(b"after\n").unwrap();
        }
        drop(log);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        let rest = rest.trim_start_matches('y');
        assert!(rest.starts_with("\n[1 lines of the log are lost"), "{rest:?}");
        assert!(rest.ends_with("\nafter\n"), "{rest:?}");
    }

    #[test]
    fn a_reader_that_is_gone_disturbs_nothing() {
        let (reader, mut log) = pipe();
        drop(reader);
        (0..3).for_each(|_| log.write_all(b"hello\n").unwrap());
        assert_eq!(log.lost, 3);
    }
}
