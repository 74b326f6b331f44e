//! The whole supervisor as a state that the next program of this process goes on with.

use super::waiting::Waiting;
use super::watched::PackedMetrics;
use super::{ListenSocket, Metrics, Options, Signals, Supervision, Supervisor, Watched};
use crate::deaths::Deaths;
use crate::front::{Front, PackedFront, Ticket};
use crate::process::{PackedServer, Program, Server};
use crate::reexec::StateError;
use crate::session::Session;
use crate::slots::{Missing, Packing, Slot, Unpacking};
use crate::store::{PackedStore, Store};
use crate::vault::Vault;
use channel::Settings;
use control::{KeptName, Limits, SocketFile};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};
use telemetry::Book;
use telemetry::tally::Tally;

/// A [`ListenSocket`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PackedSocket {
    Path { listener: Slot, name: KeptName },
    Inherited { listener: Slot },
}

/// [`Options`].
#[derive(Debug, Serialize, Deserialize)]
struct PackedOptions {
    frontends: PackedSocket,
    control_path: PathBuf,
    program: Program,
    settings: Settings,
    domain: String,
    params: BTreeMap<String, String>,
    has_spare: bool,
    hang_timeout_ms: Option<u64>,
    /// A signal that came before the exchange can still be read there.
    ends: Vec<(String, Slot)>,
}

/// What the next program has to do first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Order {
    /// Who is waiting for it.
    pub(super) ticket: Ticket,
    /// The server is to be exchanged, too: by this program.
    pub(super) then: Option<Program>,
    /// The version of the program before.
    pub(super) from: String,
    /// How long it took to start the new program for its look at the state, in microseconds.
    pub(super) start_us: u64,
    /// How long it has looked.
    pub(super) prepare_us: u64,
    /// When the state was packed.
    pub(super) packed: SystemTime,
    /// This program is the one before: the one at this path could not go on.
    #[serde(default)]
    pub(super) came_back_from: Option<PathBuf>,
}

/// A supervisor. What is only lent while it is packed has a type of its own.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Packed<V, D, S> {
    /// [`channel::VERSION`] of what its server speaks.
    channel: u32,
    order: Order,
    options: PackedOptions,
    vault: V,
    #[serde(default)]
    store: PackedStore,
    deaths: D,
    session: Option<S>,
    #[serde(default = "Option::default")]
    waiting: Option<S>,
    recoveries: u64,
    program_before: Option<Program>,
    server: Option<PackedServer>,
    leaving: Vec<PackedServer>,
    sessions: u64,
    ending_session: Option<u64>,
    told: Option<u64>,
    front: Option<PackedFront>,
    #[serde(default)]
    metrics: Option<PackedMetrics>,
    #[serde(default)]
    tally: Tally,
}

/// As it is written down.
pub(super) type Lent<'a> = Packed<&'a Vault, &'a Deaths, &'a Session>;
/// As it is read.
pub(super) type Given = Packed<Vault, Deaths, Session>;

impl Given {
    /// Whether this program can go on with it.
    pub(super) fn find_fault(&self) -> Result<(), String> {
        if self.channel != channel::VERSION {
            return Err(format!(
                "its server speaks version {} of the channel, and this program version {}; \
                 exchange the server first (--only server)",
                self.channel,
                channel::VERSION
            ));
        }
        Ok(())
    }
}

impl Supervisor {
    /// Everything, at a moment at which no exchange is under way.
    pub(super) fn pack(&self, order: Order) -> (Lent<'_>, Packing<'_>) {
        let mut packing = Packing::default();
        let listener = packing.put(self.options.frontends.listener().as_fd());
        let frontends = match &self.options.frontends {
            ListenSocket::Path(socket) => PackedSocket::Path { listener, name: socket.keep() },
            ListenSocket::Inherited(_) => PackedSocket::Inherited { listener },
        };
        let ends = self.options.ends.iter();
        let hang_timeout = self.options.supervision.hang_timeout;
        let options = PackedOptions {
            frontends,
            control_path: self.options.control_path.clone(),
            program: self.options.program.clone(),
            settings: self.options.settings.clone(),
            domain: self.options.domain.clone(),
            params: self.options.params.clone(),
            has_spare: self.options.supervision.has_spare,
            hang_timeout_ms: hang_timeout
                .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            ends: ends.map(|(word, end)| (word.clone(), packing.put(end.as_fd()))).collect(),
        };
        let leaving = self.leaving.iter().map(|(server, _)| server.pack(&mut packing)).collect();
        let state = Packed {
            channel: channel::VERSION,
            order,
            options,
            vault: &self.vault,
            store: self.store.pack(),
            deaths: &self.deaths,
            session: self.session.as_ref(),
            waiting: self.waiting.as_ref().map(|waiting| &waiting.session),
            recoveries: self.recoveries,
            program_before: self.program_before.clone(),
            server: self.server.as_ref().map(|server| server.pack(&mut packing)),
            leaving,
            sessions: self.sessions,
            ending_session: self.ending_session,
            told: self.told,
            front: self.front.as_ref().map(|front| front.pack(&mut packing)),
            metrics: self.watched.metrics.as_ref().map(|metrics| metrics.pack(&mut packing)),
            tally: self.watched.tally.clone(),
        };
        (state, packing)
    }

    /// Goes on with what another program of this process has packed; what is to be done first, and
    /// the signals that have come meanwhile.
    pub(super) fn unpack(
        state: Given,
        ends: Vec<(String, OwnedFd)>,
        signals: Signals,
        unpacking: &mut Unpacking,
    ) -> Result<(Self, Order, Vec<String>), StateError> {
        state.find_fault().map_err(StateError::Other)?;
        let before = state.options.ends.into_iter();
        let before: Vec<_> = before
            .map(|(word, slot)| unpacking.take(slot).map(|end| (word, end)))
            .collect::<Result<_, _>>()?;
        let frontends = match state.options.frontends {
            PackedSocket::Path { listener, name } => {
                ListenSocket::Path(SocketFile::resume(name, unpacking.take(listener)?))
            }
            PackedSocket::Inherited { listener } => {
                ListenSocket::Inherited(unpacking.take(listener)?.into())
            }
        };
        let supervision = Supervision {
            has_spare: state.options.has_spare,
            hang_timeout: state.options.hang_timeout_ms.map(Duration::from_millis),
        };
        // On the way out with an error nothing is taken down: another program may have to go on.
        let mut supervisor = ManuallyDrop::new(Self::new(Options {
            frontends,
            control_path: state.options.control_path,
            program: state.options.program,
            settings: state.options.settings,
            domain: state.options.domain,
            params: state.options.params,
            metrics: None,
            book: Book::default(),
            supervision,
            ends,
            signals,
        }));
        let now = Instant::now();
        supervisor.start_at = None;
        supervisor.has_served = true;
        supervisor.vault = state.vault;
        supervisor.store = Store::unpack(state.store);
        supervisor.deaths = state.deaths;
        supervisor.session = state.session;
        supervisor.waiting = state.waiting.map(|mut session| {
            session.relay.question_is_lost();
            Waiting::new(session)
        });
        supervisor.recoveries = state.recoveries;
        supervisor.program_before = state.program_before;
        // It is not packed while none serves.
        supervisor.served = Some(supervisor.options.program.clone());
        let server = state.server.map(|server| Server::unpack(server, unpacking));
        supervisor.server = server.transpose()?;
        let leaving = state.leaving.into_iter().map(|server| {
            Server::unpack(server, unpacking).map(|server| (server, now + super::LEAVE_PATIENCE))
        });
        supervisor.leaving = leaving.collect::<Result<_, Missing>>()?;
        supervisor.sessions = state.sessions;
        supervisor.ending_session = state.ending_session;
        supervisor.told = state.told;
        let front = state.front.map(|front| Front::unpack(front, Limits::default(), unpacking));
        supervisor.front = front.transpose()?;
        let metrics = state.metrics.map(|metrics| Metrics::unpack(metrics, unpacking));
        supervisor.watched = Watched { metrics: metrics.transpose()?, tally: state.tally };
        // What could write to it is gone, so that this does not wait.
        let has_come =
            |end: &OwnedFd| rustix::io::read(end, &mut [0; 1]).is_ok_and(|read| read > 0);
        let come = before.into_iter().filter(|(_, end)| has_come(end)).map(|(word, _)| word);
        Ok((ManuallyDrop::into_inner(supervisor), state.order, come.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::scripted::{self, file};
    use super::*;
    use crate::descriptor::Descriptor;
    use crate::pages::Pages;
    use crate::reexec::{Written, read};
    use crate::region::Region;
    use crate::relay::Relay;
    use crate::request;
    use crate::wire::Message;
    use serde_json::Value;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    /// What this release packs: a state that later ones must be able to read.
    const FIXTURE: &str = include_str!("state-1.json");
    /// The same, of a release that counts and keeps history as well.
    const WATCHED: &str = include_str!("state-1-watched.json");

    /// A supervisor in the middle of everything, and what keeps it so.
    fn supervisor(directory: &Path) -> (Supervisor, Vec<UnixStream>) {
        let listen = |name| SocketFile::listen(&directory.join(name), 0o600).unwrap();
        let (options, end_writer) = scripted::options(directory);
        let pages = telemetry::Address::Path(directory.join("metrics"));
        let mut supervisor = Supervisor::new(Options {
            metrics: Some(Metrics::new(Pages::listen(&pages).unwrap(), 1).unwrap()),
            supervision: Supervision {
                has_spare: false,
                hang_timeout: Some(Duration::from_secs(3)),
            },
            ..options
        });
        let live = Some(scripted::module(1));
        let list = channel::Vault { generation: 3, live, ..channel::Vault::default() };
        supervisor.vault.take(list, &[1], vec![file()]).unwrap();
        supervisor.server = Some(scripted::server());
        supervisor.front = Some(Front::new(listen("control"), Limits::default()).unwrap());
        let (frontend, ours) = UnixStream::pair().unwrap();
        let mut relay = Relay::new(Region::own(1).unwrap(), None, 128);
        relay.from_frontend(Message::new(request::SET_OWNER, [], Vec::new()));
        let kick = vec![Descriptor::from(file())];
        relay.from_frontend(Message::new(request::SET_VRING_KICK, 0_u64.to_le_bytes(), kick));
        supervisor.session = Some(Session::new(7, frontend.into(), relay));
        (supervisor, vec![end_writer, ours])
    }

    fn order() -> Order {
        let mut front = Front::new(
            SocketFile::listen(&tempfile::tempdir().unwrap().path().join("x"), 0o600).unwrap(),
            Limits::default(),
        )
        .unwrap();
        Order {
            ticket: front.any_ticket(),
            then: None,
            from: "0.1.0".into(),
            start_us: 1,
            prepare_us: 2,
            packed: SystemTime::UNIX_EPOCH,
            came_back_from: None,
        }
    }

    /// What `old` has that `new` has not, or has otherwise.
    fn lost(path: &str, old: &Value, new: &Value) -> Vec<String> {
        match (old, new) {
            (Value::Object(old), Value::Object(new)) => old
                .iter()
                .flat_map(|(key, old)| {
                    let none = Value::String("nothing".into());
                    lost(&format!("{path}.{key}"), old, new.get(key).unwrap_or(&none))
                })
                .collect(),
            (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
                old.iter().zip(new).flat_map(|(old, new)| lost(path, old, new)).collect()
            }
            _ if old == new => Vec::new(),
            _ => vec![format!("{path}: {old} is {new}")],
        }
    }

    #[test]
    fn a_state_of_the_first_release_is_understood_to_the_last_member() {
        let any = Descriptor::from(file());
        let mut fixture = file();
        std::fs::File::from(fixture.try_clone().unwrap()).write_all(FIXTURE.as_bytes()).unwrap();
        let read = || {
            let copy = fixture.try_clone().unwrap();
            Descriptor::stand_in(any.clone(), || crate::reexec::read_state::<Given>(copy))
        };
        let given = read().unwrap();
        assert_eq!(given.find_fault(), Ok(()));
        let old: Value = serde_json::from_str(FIXTURE).unwrap();
        let mut new = serde_json::to_value(&given).unwrap();
        // Descriptors have the number of what stands for all of them; slots keep theirs.
        let number = std::os::fd::AsRawFd::as_raw_fd(&any);
        let text = FIXTURE.replace("1000", &number.to_string());
        let expected: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(lost("state", &expected["state"], &new), [""; 0]);
        new["recoveries"] = 9.into();
        assert_eq!(lost("state", &expected["state"], &new), ["state.recoveries: 2 is 9"]);
        // One that cannot be understood is found out.
        let bad = FIXTURE.replace("\"vault\":", "\"volt\":");
        assert_ne!(bad, FIXTURE);
        fixture = file();
        std::fs::File::from(fixture.try_clone().unwrap()).write_all(bad.as_bytes()).unwrap();
        let error = Descriptor::stand_in(any.clone(), || {
            crate::reexec::read_state::<Given>(fixture).unwrap_err().to_string()
        });
        assert!(error.contains("missing field `vault`"), "{error}");
        let other = FIXTURE.replace("\"channel\": 1,", "\"channel\": 99,");
        let given = Descriptor::stand_in(any, || {
            serde_json::from_value::<Given>(
                serde_json::from_str::<Value>(&other).unwrap()["state"].clone(),
            )
        });
        assert!(given.unwrap().find_fault().unwrap_err().contains("version 99 of the channel"));
        assert_eq!(old["version"], crate::reexec::VERSION);
    }

    #[test]
    fn a_state_with_metrics_and_history_is_understood_to_the_last_member() {
        let any = Descriptor::from(file());
        let fixture = file();
        std::fs::File::from(fixture.try_clone().unwrap()).write_all(WATCHED.as_bytes()).unwrap();
        let given = Descriptor::stand_in(any.clone(), || {
            crate::reexec::read_state::<Given>(fixture).unwrap()
        });
        assert_eq!(given.find_fault(), Ok(()));
        let number = std::os::fd::AsRawFd::as_raw_fd(&any);
        let text = WATCHED.replace("1000", &number.to_string());
        let expected: Value = serde_json::from_str(&text).unwrap();
        let mut new = serde_json::to_value(&given).unwrap();
        assert_eq!(lost("state", &expected["state"], &new), [""; 0]);
        new["front"]["book_directory"] = Value::Null;
        let expected = lost("state", &expected["state"], &new);
        assert_eq!(expected, ["state.front.book_directory: 41 is null"]);
    }

    #[test]
    fn another_program_has_the_same_supervisor() {
        let directory = tempfile::tempdir().unwrap();
        let (before, mut others) = supervisor(directory.path());
        // A signal that came before the exchange is not lost.
        others[0].write_all(b"x").unwrap();
        let (state, packing) = before.pack(order());
        let socket = Written::write(&state, packing).unwrap().send().unwrap();
        let first = serde_json::to_value(&state).unwrap();
        drop(state);
        // As a program ends that is exchanged: without a word.
        drop(others.remove(0));
        std::mem::forget(before);
        let (given, mut unpacking) = read::<Given>(socket).unwrap();
        let (end, _end_writer) = UnixStream::pair().unwrap();
        let ends = vec![("signal 15".into(), OwnedFd::from(end))];
        let signals = Signals { hold: || {}, release: || {} };
        let (after, _, come) = Supervisor::unpack(given, ends, signals, &mut unpacking).unwrap();
        assert_eq!(come, ["signal 15"]);
        let (state, _packing) = after.pack(order());
        let mut second = serde_json::to_value(&state).unwrap();
        // Numbers of descriptors are others'; what they lead to is checked by use.
        for at in [
            "/options/frontends/path/listener",
            "/options/ends/0/1",
            "/vault/objects/1",
            "/options/program/file",
            "/server/program/file",
            "/server/pidfd",
            "/server/channel",
            "/session/frontend/socket",
            "/session/relay/region/memfd",
            "/session/relay/asked/1/message/files/0",
            "/front/listener",
            "/metrics/memory",
            "/metrics/pages/listener",
        ] {
            *second.pointer_mut(at).unwrap() = first.pointer(at).unwrap().clone();
        }
        assert_eq!(lost("state", &first, &second), [""; 0]);
        UnixStream::connect(directory.path().join("disk")).unwrap();
        UnixStream::connect(directory.path().join("control")).unwrap();
        UnixStream::connect(directory.path().join("metrics")).unwrap();
        drop(after);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
