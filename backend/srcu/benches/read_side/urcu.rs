//! liburcu-memb, if Debian's `liburcu-dev` and a C compiler are there: a C program of its own,
//! which is how it is fastest.

use std::path::PathBuf;
use std::process::Command;

/// The program, compiled; removed in the end.
pub(crate) struct Urcu(PathBuf);

impl Urcu {
    /// Compiles it.
    pub(crate) fn build() -> Option<Self> {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/read_side/urcu.c");
        let program = std::env::temp_dir().join(format!("read-side-urcu-{}", std::process::id()));
        let mut compiler = Command::new("cc");
        compiler.args(["-O2", "-pthread", "-o"]).arg(&program).args([source, "-lurcu-memb"]);
        compiler.output().is_ok_and(|output| output.status.success()).then_some(Self(program))
    }

    fn run(&self, what: &str, readers: usize, count: u64) -> Vec<f64> {
        let output = Command::new(&self.0)
            .args([what, &readers.to_string(), &count.to_string()])
            .output()
            .expect("it was compiled a moment ago");
        let text = String::from_utf8_lossy(&output.stdout);
        text.split_whitespace().map(|number| number.parse().expect("a number")).collect()
    }

    /// Nanoseconds per section, of the slowest reader.
    pub(crate) fn sections(&self, readers: usize, count: u32) -> f64 {
        self.run("sections", readers, u64::from(count))[0]
    }

    /// Nanoseconds that it takes to wait for readers that are always busy: median and 99 %.
    pub(crate) fn wait(&self, readers: usize, rounds: usize) -> [f64; 2] {
        let times = self.run("wait", readers, rounds as u64);
        [times[0], times[1]]
    }
}

impl Drop for Urcu {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
