//! NBD servers, as people run them: nbdkit, qemu-nbd, nbd-server, each behind a Unix socket in a
//! folder of its own.

use crate::PATIENCE;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A server; it is killed with the value.
pub struct NbdServer {
    child: Option<Child>,
    folder: TempDir,
    command: Vec<String>,
    environment: Vec<(String, String)>,
}

impl NbdServer {
    /// nbdkit with these arguments.
    pub fn nbdkit(arguments: &[&str]) -> NbdServer {
        NbdServer::new(&[&["nbdkit", "--foreground", "--unix", "SOCKET"], arguments].concat())
    }

    /// qemu-nbd, which goes on without clients, with these arguments.
    pub fn qemu_nbd(arguments: &[&str]) -> NbdServer {
        NbdServer::new(&[&["qemu-nbd", "--persistent", "--socket", "SOCKET"], arguments].concat())
    }

    /// Any other: `SOCKET` stands for its socket, and `FOLDER` for its folder.
    pub fn new(command: &[&str]) -> NbdServer {
        NbdServer::with_environment(command, &[])
    }

    /// The same, with more in its environment.
    pub fn with_environment(command: &[&str], environment: &[(&str, &str)]) -> NbdServer {
        let mut server = NbdServer::prepared(command, environment);
        server.start();
        server
    }

    /// One that is not started yet.
    pub fn prepared(command: &[&str], environment: &[(&str, &str)]) -> NbdServer {
        let folder = super::daemon::disk_directory();
        let path = folder.path().to_str().expect("UTF-8").to_owned();
        let word = |word: &&str| word.replace("SOCKET", "FOLDER/socket").replace("FOLDER", &path);
        NbdServer {
            child: None,
            command: command.iter().map(word).collect(),
            environment: environment.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            folder,
        }
    }

    /// Starts it, and waits until it listens.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let _ = std::fs::remove_file(self.socket());
        let child = Command::new(&self.command[0])
            .args(&self.command[1..])
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}; `scripts/setup` installs it", self.command[0]));
        self.child = Some(child);
        let deadline = Instant::now() + PATIENCE;
        // The socket is there before it is listened on.
        while UnixStream::connect(self.socket()).is_err() {
            assert!(Instant::now() < deadline, "{:?} does not listen", self.command);
            let child = self.child.as_mut().expect("just started");
            if child.try_wait().expect("just started").is_some() {
                // It was killed at once, as some tests have it.
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills it.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            child.wait().expect("it was started");
        }
    }

    /// Starts it again whenever it has ended by itself, until the value ends.
    pub fn keep_running(mut self) -> KeptRunning {
        let (orders, ordered) = mpsc::channel::<Sender<()>>();
        let keeper = thread::spawn(move || {
            let mut ends = 0;
            loop {
                match ordered.recv_timeout(Duration::from_millis(2)) {
                    Ok(done) => {
                        self.kill();
                        self.start();
                        let _ = done.send(());
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return ends,
                }
                let child = self.child.as_mut().expect("it was started");
                if let Some(status) = child.try_wait().expect("it was started") {
                    println!("{} has ended: {status}", self.command[0]);
                    ends += 1;
                    self.child = None;
                    self.start();
                }
            }
        });
        KeptRunning { orders, keeper }
    }

    /// Ends it with SIGTERM, and waits for that.
    pub fn terminate(&mut self) {
        let pid = Pid::from_raw(self.pid() as i32).expect("a process id");
        kill_process(pid, Signal::TERM).expect("it lives");
        self.child.take().expect("it runs").wait().expect("it was started");
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Where it keeps what it has.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A parameter that names its export.
    pub fn uri(&self, export: &str) -> String {
        format!("uri=nbd+unix:///{export}?socket={}", self.socket().display())
    }
}

/// A server that is started again whenever it has ended by itself.
pub struct KeptRunning {
    orders: Sender<Sender<()>>,
    keeper: JoinHandle<u64>,
}

impl KeptRunning {
    /// Kills it, and waits until it is started again.
    pub fn kill(&self) {
        let (done, is_done) = mpsc::channel();
        self.orders.send(done).expect("it is kept running");
        is_done.recv().expect("it is started again");
    }

    /// Ends the server for good. Returns how often it has ended by itself.
    pub fn end(self) -> u64 {
        drop(self.orders);
        self.keeper.join().expect("it was started again each time")
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.kill();
    }
}
