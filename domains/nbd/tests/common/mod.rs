//! Servers to test with: real ones, each with a socket in a folder of its own.

#![allow(dead_code, reason = "each test program uses some of it")]

pub mod scripted;

use domain_api::Params;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A server, ended with the value.
pub struct Server {
    child: Option<Child>,
    folder: TempDir,
    command: Vec<String>,
}

impl Server {
    /// nbdkit with these arguments behind its socket.
    pub fn nbdkit(arguments: &[&str]) -> Self {
        let mut all = vec!["nbdkit", "--foreground", "--unix", "SOCKET"];
        all.extend_from_slice(arguments);
        Self::new(&all)
    }

    /// qemu-nbd with these arguments.
    pub fn qemu_nbd(arguments: &[&str]) -> Self {
        let mut all = vec!["qemu-nbd", "--persistent", "--socket", "SOCKET"];
        all.extend_from_slice(arguments);
        Self::new(&all)
    }

    /// A command with `SOCKET` for its socket, and `FOLDER` for a folder of its own.
    pub fn new(command: &[&str]) -> Self {
        let mut server = Self::prepared(command);
        server.start();
        server
    }

    /// The same, not started yet.
    pub fn prepared(command: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let command = command
            .iter()
            .map(|word| match *word {
                "SOCKET" => folder.path().join("socket").to_str().unwrap().to_owned(),
                word => word.replace("FOLDER", folder.path().to_str().unwrap()),
            })
            .collect();
        Self { child: None, folder, command }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Starts it, and waits until it listens.
    pub fn start(&mut self) {
        assert!(self.child.is_none());
        let _ = std::fs::remove_file(self.socket());
        let child = Command::new(&self.command[0])
            .args(&self.command[1..])
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}; run scripts/setup", self.command[0]));
        self.child = Some(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            assert!(Instant::now() < deadline, "{:?} does not listen", self.command);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    pub fn params(&self, more: &[&str]) -> Params {
        let mut params = Params::from_pairs(more).unwrap();
        params.set("uri", self.uri());
        params
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// nbdkit on a port, ended with the value.
pub struct TcpServer {
    child: Child,
    port: u16,
}

impl TcpServer {
    /// On a port that was free a moment ago.
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        Self { child: Self::at(port), port }
    }

    fn at(port: u16) -> Child {
        let child = Command::new("nbdkit")
            .args(["-f", "-i", "127.0.0.1", "-p", &port.to_string(), "memory", "2M"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        child
    }

    /// Kills it, and starts another one in its place.
    pub fn exchange(&mut self) {
        self.end();
        self.child = Self::at(self.port);
    }

    fn end(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn params(&self, more: &[&str]) -> Params {
        let mut params = Params::from_pairs(more).unwrap();
        params.set("uri", format!("nbd://127.0.0.1:{}/any", self.port));
        params
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        self.end();
    }
}
