//! What is said, and what it means.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Of the messages. A side that is told of another one says so, and does not go on.
pub const VERSION: u32 = 1;

/// Names a descriptor that was sent once, for as long as the channel is open. Numbers are the
/// server's, and come once.
pub type Kept = u64;

/// How much a guest may do in a second, on all queues together. 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RateLimits {
    /// Requests.
    pub iops: u64,
    /// Of these, so many at once.
    pub iops_burst: u64,
    /// Bytes.
    pub bandwidth: u64,
    /// Of these, so many at once.
    pub bandwidth_burst: u64,
}

/// What a server confines itself to, before any code of a module runs in it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Sandbox {
    /// What it does not need is refused; else it is only logged.
    pub enforces: bool,
    /// Folders of modules, which are read.
    pub modules: Vec<PathBuf>,
    /// Files that it reads and writes.
    pub files: Vec<PathBuf>,
    /// It does not write to them.
    pub reads_only: bool,
    /// It connects to others.
    pub connects: bool,
    /// To these ports.
    pub ports: Vec<u16>,
    /// And to these sockets with a path.
    pub sockets: Vec<PathBuf>,
    /// Hosts are given by their addresses: no name is looked up.
    pub by_address: bool,
    /// Whether its files are to be served with io_uring; nothing if that is left to it. A
    /// supervisor of before has not said, and they were.
    #[serde(default = "as_before")]
    pub rings: Option<bool>,
}

const fn as_before() -> Option<bool> {
    Some(true)
}

impl Sandbox {
    /// Whether names of hosts are looked up.
    #[must_use]
    pub const fn looks_names_up(&self) -> bool {
        !self.ports.is_empty() && !self.by_address
    }

    /// Whether sockets with a path are connected to. A supervisor of before has not said which.
    #[must_use]
    pub const fn connects_to_paths(&self) -> bool {
        self.connects && (self.ports.is_empty() || !self.sockets.is_empty())
    }
}

/// What a server is told once, before anything else, and what does not change while it lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Number of queues.
    pub queues: u16,
    /// Largest size of a queue.
    pub queue_size: u16,
    /// How long a worker polls before it sleeps, in microseconds.
    pub poll_us: u64,
    /// Which CPU each worker is kept on, in turn; none if empty.
    #[serde(default)]
    pub worker_cpus: Vec<usize>,
    /// Where modules are looked up.
    pub domain_dirs: Vec<PathBuf>,
    /// If there are any: public keys of minisign, of which one has to have signed a module.
    #[serde(default, skip_serializing_if = "is_default")]
    pub trusted_keys: Vec<String>,
    /// What a server confines itself to; it does not, if there is nothing. One that does not know
    /// this does not, either, and does not say that it has.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sandbox: Option<Sandbox>,
    /// How much the guest may do at first: a vault that says something else is right.
    #[serde(default, skip_serializing_if = "is_default")]
    pub limits: RateLimits,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What a server begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// With an empty storage and this module: a name or a path, and its parameters.
    First {
        /// Name or path.
        domain: String,
        /// Parameters.
        params: BTreeMap<String, String>,
    },
    /// With what another server has left. Its descriptors come with the message, in the order of
    /// [`Vault::objects`].
    Vault(Box<Vault>),
}

/// A module whose bytes are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// The domain's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Where it was read from.
    pub path: PathBuf,
    /// Of its bytes, in hexadecimal.
    pub sha256: String,
    /// By which it was found to be of trusted origin, if that was asked for.
    #[serde(default, skip_serializing_if = "is_default")]
    pub signature: Option<String>,
    /// What it was prepared with, inherited parameters included.
    pub params: BTreeMap<String, String>,
    /// Its bytes: a sealed memfd.
    pub image: Kept,
}

/// Memory of the storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its key.
    pub key: String,
    /// Its length in bytes.
    pub len: u64,
    /// Its memfd.
    pub memfd: Kept,
}

/// Bytes of the storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// Their key.
    pub key: String,
    /// A memfd whose whole content they are.
    pub memfd: Kept,
}

/// A file of the storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Its key.
    pub key: String,
    /// A descriptor of the same open file description, with its locks and its errors.
    pub file: Kept,
}

/// What must outlive a server: everything that the next one needs to be the same device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Vault {
    /// Number of the live instance.
    pub generation: u64,
    /// The live module; none if the device is faulted.
    pub live: Option<Module>,
    /// The standby.
    #[serde(default)]
    pub standby: Option<Module>,
    /// Why nothing serves, if nothing does.
    #[serde(default)]
    pub fault: Option<String>,
    /// Number of the storage's schema, 0 while it is empty.
    pub schema: u32,
    /// Memory.
    #[serde(default)]
    pub regions: Vec<Region>,
    /// Bytes.
    #[serde(default)]
    pub bytes: Vec<Bytes>,
    /// Files.
    #[serde(default)]
    pub files: Vec<Stored>,
    /// Why something that was written may be lost.
    #[serde(default)]
    pub failure: Option<String>,
    /// What instances have counted.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
    /// Capabilities that a guest relies on, a bit each.
    #[serde(default)]
    pub required: u64,
    /// More that only servers understand: what the guest was told of the device, and what its
    /// driver believes.
    #[serde(default)]
    pub told: serde_json::Value,
}

impl Vault {
    /// All that it refers to, without doubles, in a fixed order.
    #[must_use]
    pub fn objects(&self) -> Vec<Kept> {
        let modules = self.live.iter().chain(&self.standby).map(|module| module.image);
        let regions = self.regions.iter().map(|region| region.memfd);
        let bytes = self.bytes.iter().map(|bytes| bytes.memfd);
        let files = self.files.iter().map(|file| file.file);
        let mut objects = Vec::new();
        for object in modules.chain(regions).chain(bytes).chain(files) {
            if !objects.contains(&object) {
                objects.push(object);
            }
        }
        objects
    }
}

/// A request that is not to be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// Its queue.
    pub queue: u16,
    /// Its first descriptor.
    pub head: u16,
    /// Its counter in the in-flight region.
    pub counter: u64,
}

/// Where an in-flight region lies in its memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightRegion {
    /// Bytes before it.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Number of queues that it has room for.
    pub queues: u16,
    /// Number of entries of each queue.
    pub queue_size: u16,
    /// A ring that is stopped while the guest is migrated leaves there what is in flight.
    #[serde(default)]
    pub leaves: bool,
}

/// A session that begins: a frontend's, or one that is replayed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Session {
    /// The supervisor's number of it; comes back with [`ToSupervisor::SessionEnded`]. It is the
    /// same if another server had the session and its messages are said again: then its driver
    /// goes on with what the vault says that it believes. No other session that the vault can know
    /// of has it.
    pub number: u64,
    /// The in-flight region, whose memfd is the second descriptor of the message.
    #[serde(default)]
    pub inflight: Option<InflightRegion>,
    /// What is marked in flight is run one at a time, the oldest first, before anything new.
    #[serde(default)]
    pub cautious: bool,
    /// Requests that are answered with an I/O error instead of being run.
    #[serde(default)]
    pub quarantined: Vec<Quarantined>,
}

/// What the supervisor says.
// The first message is long, and comes once.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToServer {
    /// The first message: be this device. Answered with [`ToSupervisor::Ready`],
    /// [`ToSupervisor::Prepared`] or [`ToSupervisor::Failed`].
    Start {
        /// [`VERSION`] of the supervisor.
        version: u32,
        /// What does not change.
        settings: Settings,
        /// What to begin with.
        start: Start,
        /// The device belongs to another server still: verify, load and prepare, and wait for
        /// [`ToServer::Activate`].
        prepare_only: bool,
        /// [`ToSupervisor::Aside`] is understood.
        #[serde(default)]
        hears_aside: bool,
        /// [`ToSupervisor::Happened`] is understood.
        #[serde(default)]
        hears_events: bool,
    },
    /// Before [`ToServer::Start`]: requests are to be counted, in a memfd that comes with this. A
    /// server that does not know the layout, or this message, does not count.
    Counters {
        /// Of the memfd.
        layout: u32,
    },
    /// The device is this server's now, as the vault has it. Its descriptors come as those of
    /// [`Start::Vault`] do. Answered with [`ToSupervisor::Ready`] or [`ToSupervisor::Failed`].
    Activate {
        /// What the other server has left.
        vault: Box<Vault>,
    },
    /// A frontend's connection waits at the listening socket that comes with this, the first
    /// descriptor. Served when the session before has ended.
    Session(Session),
    /// The running session has another in-flight region from its next ring start on; its memfd
    /// comes with this. Answered with [`ToSupervisor::InflightTaken`].
    Inflight(InflightRegion),
    /// A client of the control socket, which may command; its stream comes with this.
    Client,
    /// Stop serving at a batch boundary, with nothing in flight, and give the storage up. Answered
    /// with [`ToSupervisor::Stopped`] or [`ToSupervisor::NotStopped`].
    Stop {
        /// How long to wait for requests in flight.
        drain_timeout_ms: u64,
    },
    /// After [`ToServer::Stop`]: go on as before. Answered with [`ToSupervisor::Resumed`].
    Resume,
    /// After [`ToServer::Stop`]: end at once. Another server has the device.
    Exit,
    /// End as after SIGTERM: what is in flight is answered, the last flush done. The process's exit
    /// status says whether all of it went well. For a server that serves: after
    /// [`ToServer::Stop`], not before it has said that it could not, or has come back.
    Shutdown {
        /// Why, for the log.
        why: String,
    },
    /// Are the workers alive? Answered with [`ToSupervisor::Pong`].
    Ping {
        /// Comes back.
        number: u64,
    },
    /// A [`ToSupervisor::Vault`] was lost: say all there is, with all its objects. A server that
    /// does not know this message goes on without it.
    VaultAgain,
}

/// What the server says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToSupervisor {
    /// The device is this server's, and it serves.
    Ready {
        /// [`VERSION`] of the server.
        version: u32,
        /// Of the program.
        program: String,
        /// One sentence for the log.
        serves: String,
        /// All that happens from now on is said with [`ToSupervisor::Happened`].
        #[serde(default)]
        tells_events: bool,
        /// It has confined itself, as it was told to.
        #[serde(default)]
        confined: bool,
    },
    /// All is ready but for what belongs to another server.
    Prepared {
        /// [`VERSION`] of the server.
        version: u32,
        /// Of the program.
        program: String,
        /// It has confined itself, as it was told to.
        #[serde(default)]
        confined: bool,
    },
    /// It cannot be this device; the process ends.
    Failed {
        /// A stable word.
        code: String,
        /// A sentence.
        message: String,
    },
    /// What the next server needs, from now on. Descriptors come for the objects that were not
    /// sent before, named by `new` in the same order.
    Vault {
        /// All there is.
        vault: Box<Vault>,
        /// The objects whose descriptors come with this.
        new: Vec<Kept>,
    },
    /// There is a second channel, whose end comes with this. It carries [`ToSupervisor::Vault`]
    /// only, and is not waited at: it is read whenever something comes on the first one, before
    /// that is understood, and when the server has died. So what is put there wakes nothing.
    Aside,
    /// There is something on the second channel.
    Look,
    /// Something has happened to the device that those who watch it are to know.
    Happened {
        /// What: an object, in which `event` names it.
        event: serde_json::Value,
    },
    /// A session is over, and everything of it has left.
    SessionEnded {
        /// [`Session::number`].
        number: u64,
        /// What went wrong, if something did.
        error: Option<String>,
    },
    /// The region of the last [`ToServer::Inflight`] is used from the next ring start on.
    InflightTaken,
    /// The device is not this server's any more. The vault was sent before.
    Stopped {
        /// How long the rings had to be waited for, in nanoseconds.
        drain_ns: u64,
    },
    /// It serves on.
    NotStopped {
        /// A stable word.
        code: String,
        /// A sentence.
        message: String,
    },
    /// It serves again.
    Resumed,
    /// The answer to [`ToServer::Ping`].
    Pong {
        /// [`ToServer::Ping`]'s.
        number: u64,
        /// Queues whose worker has not come by since the last one, and is not asleep.
        stuck: Vec<u16>,
    },
    /// The guest is to look at the configuration space again.
    ConfigChanged,
    /// A client has asked for the end.
    ShutdownWanted,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_supervisor_of_before_has_granted_what_it_did_not_say() {
        let of_before = r#"{"enforces":true,"files":["/x"],"connects":true,"ports":[]}"#;
        let read: Sandbox = serde_json::from_str(of_before).unwrap();
        assert_eq!((read.rings, read.connects_to_paths()), (Some(true), true));
        let now = Sandbox { rings: None, ..read };
        let said = serde_json::to_string(&now).unwrap();
        assert_eq!(serde_json::from_str::<Sandbox>(&said).unwrap(), now);
    }
}
