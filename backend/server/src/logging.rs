//! The log: lines on standard error, of which none ever waits for its reader.
//!
//! What is said is often said under a lock: an upgrade's, a worker's. If standard error is a pipe
//! without a reader that reads, or a terminal that was stopped, a plain write would wait
//! there, and with it the upgrade, the next frontend and the daemon's end. So it is asked first
//! whether there is room. A line without room is lost, and how many were is said as soon as there
//! is some.
//!
//! A line is written for people, or as a JSON object. Which of the two is said once, to the first
//! process; those that it starts find it in their environment.

use env_logger::fmt::Formatter;
use log::Record;
use log::kv::{Error, Key, Value, VisitSource};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Map, json};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use supervisor::process;

/// A pipe that can be written to takes this much without waiting (POSIX's `PIPE_BUF`, as Linux has
/// it).
const ROOM: usize = 4096;

/// How long a reader that is merely slow is waited for, once.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Where a process that is started finds its format.
const FORMAT_VARIABLE: &str = "VHOST_HOTSWAP_LOG_FORMAT";

/// How lines are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Human,
    /// Each an object.
    Json,
}

/// Lines are objects.
static IS_JSON: AtomicBool = AtomicBool::new(false);

/// Starts logging, as `RUST_LOG` says, by default from `info` on. Panics are logged, too. Without a
/// `format` it is that of the process that has started this one.
pub fn start(format: Option<Format>) {
    let inherited = || std::env::var_os(FORMAT_VARIABLE).is_some_and(|format| format == "json");
    let is_json = format.map_or_else(inherited, |format| format == Format::Json);
    IS_JSON.store(is_json, Ordering::Relaxed);
    if let Some(format) = format {
        process::pass_on(FORMAT_VARIABLE, if format == Format::Json { "json" } else { "human" });
    }
    let writer = NonBlockingWriter::new(io::stderr(), is_json);
    let mut builder =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    builder.target(env_logger::Target::Pipe(Box::new(writer)));
    if is_json {
        builder.format(write_object);
    }
    builder.init();
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}

/// Says the last sentence of a process that cannot go on.
pub fn say_last(sentence: &str) {
    if IS_JSON.load(Ordering::Relaxed) {
        log::error!("{sentence}");
        return;
    }
    // It may not be possible to say it; that is no reason to panic.
    let _ = writeln!(io::stderr(), "vhost-hotswap: {sentence}");
}

/// Writes a line as an object.
fn write_object(to: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let mut fields = Fields::default();
    // What cannot be said is left out.
    let _ = record.key_values().visit(&mut fields);
    let line = json!({
        "time": now(),
        "level": record.level().as_str(),
        "target": record.target(),
        "message": record.args().to_string(),
        "pid": std::process::id(),
        "fields": fields.0,
    });
    writeln!(to, "{line}")
}

/// The time of day, in UTC.
fn now() -> String {
    format!("{:.3}", jiff::Timestamp::now())
}

/// What else a line says, by name.
#[derive(Default)]
struct Fields(Map<String, serde_json::Value>);

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        let number = value.to_u64().map(Into::into).or_else(|| value.to_i64().map(Into::into));
        let value = number.unwrap_or_else(|| value.to_string().into());
        self.0.insert(key.as_str().to_owned(), value);
        Ok(())
    }
}

/// Writes what there is room for, and counts what there was none for. Takes whole lines.
struct NonBlockingWriter<W> {
    out: W,
    lost: u64,
    /// The last line was cut off.
    torn: bool,
    is_json: bool,
}

impl<W: Write + AsFd> NonBlockingWriter<W> {
    const fn new(out: W, is_json: bool) -> Self {
        Self { out, lost: 0, torn: false, is_json }
    }

    /// How many lines are lost.
    fn notice(&self) -> String {
        let message = format!("{} lines of the log are lost: nobody read them", self.lost);
        if !self.is_json {
            return format!("[{message}]\n");
        }
        let object = json!({
            "time": now(), "level": "WARN",
            "target": "vhost_hotswap", "message": message, "pid": std::process::id(),
            "fields": {"lost": self.lost},
        });
        format!("{object}\n")
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
            let notice = format!("{end}{}", self.notice());
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
        (File::from(reader), NonBlockingWriter::new(File::from(writer), false))
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
