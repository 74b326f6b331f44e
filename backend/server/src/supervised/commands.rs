//! What the supervisor says while there is a device.

use super::events::EventSender;
use super::told::Believed;
use super::vault::{AsKeeper, VaultSender};
use super::{Begun, Hold, HoldCell, PROGRAM, Said, leave_at_once, say};
use crate::device::Device;
use crate::inflight::{Inflight, Quarantined, SharedInflight};
use crate::log_limit::how_to_have_more;
use crate::sandbox::Enforced;
use crate::session::{self, Beginning, SessionConfig, SessionHandle};
use crate::shutdown::Shutdown;
use channel::{Channel, InflightRegion, Session, ToServer, ToSupervisor, VERSION};
use control::{Adopting, Limits};
use proxy::{DomainProxy, Footprint, KeptModule, Options};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtqueue::inflight::Region;

/// A session that is to be served, when the one before has ended.
struct Order {
    session: Session,
    listener: UnixListener,
    region: Option<Region>,
}

/// A device on its way to another server.
struct HandOff {
    /// Calls it back, once.
    resume: Option<mpsc::Sender<()>>,
    /// That it is stopped; ends when it is this server's again.
    heard: mpsc::Receiver<()>,
}

/// What carries out the supervisor's commands.
pub(super) struct Commands {
    channel: Arc<Channel>,
    hold: Arc<HoldCell>,
    proxy: Arc<DomainProxy>,
    sessions: Arc<SessionHandle>,
    shutdown: Arc<Shutdown>,
    clients: Adopting<Device>,
    vault: Arc<VaultSender>,
    /// Sessions to serve, and the thread that does.
    orders: mpsc::Sender<Order>,
    server: JoinHandle<()>,
    /// The last that was begun.
    hand_off: Option<HandOff>,
    /// Where workers were when they were asked for last.
    footprints: Vec<Footprint>,
    /// Where sessions mark what is in flight.
    inflight: SharedInflight,
}

impl Commands {
    /// Tells the supervisor what there is, and that it is served.
    pub(super) fn new(
        channel: Arc<Channel>,
        hold: Arc<HoldCell>,
        begun: Begun,
        config: SessionConfig,
        enforced: Enforced,
    ) -> Result<Self, String> {
        let Begun { proxy, standby, believed, limits: _, hears } = begun;
        let confined = enforced.is_any();
        if hears.events {
            EventSender::start(&channel, &proxy);
        }
        let sessions = Arc::new(SessionHandle::default());
        let shutdown =
            Shutdown::new().map_err(|error| format!("cannot make an eventfd: {error}"))?;
        shutdown.serving({
            let (proxy, sessions) = (Arc::clone(&proxy), Arc::clone(&sessions));
            move || {
                proxy.begin_stop();
                sessions.stop();
            }
        });
        let limits = {
            let limiter = Arc::clone(&config.limiter);
            Box::new(move || limiter.limits())
        };
        let vault = Arc::new(VaultSender::new(&channel, &proxy, believed, limits, hears.aside));
        proxy.keep_with(Box::new(AsKeeper(Arc::clone(&vault))), standby.clone());
        let device = {
            let channel = Arc::clone(&channel);
            let stop = move || say(&channel, &ToSupervisor::ShutdownWanted);
            let device = Device::new(Arc::clone(&proxy), Arc::clone(&config.limiter), stop);
            Arc::new(device.confined(enforced))
        };
        config.limiter.on_change({
            let proxy = Arc::downgrade(&proxy);
            move |_| proxy.upgrade().into_iter().for_each(|proxy| proxy.keep_again())
        });
        proxy.on_config_change({
            let channel = Arc::clone(&channel);
            move || say(&channel, &ToSupervisor::ConfigChanged)
        });
        let inflight = config.inflight.clone();
        let (orders, receiver) = mpsc::channel();
        let service = SessionService {
            channel: Arc::clone(&channel),
            proxy: Arc::clone(&proxy),
            config,
            sessions: Arc::clone(&sessions),
            device: Arc::clone(&device),
            vault: Arc::clone(&vault),
        };
        let server = std::thread::Builder::new()
            .name("sessions".to_owned())
            .spawn(move || service.serve_all(&receiver))
            .map_err(|error| format!("no thread for sessions: {}", how_to_have_more(&error)))?;
        let domain = proxy.domain();
        let serves = format!(
            "serving `{}` {} of {} bytes, generation {}",
            domain.name,
            domain.version,
            domain.info.capacity,
            proxy.status().generation
        );
        log::info!("{serves}");
        // What the next server has to know before this one has begun anything.
        if let Err(why) = vault.settle() {
            log::error!("the supervisor does not have all that there is of the disk: {why}");
        }
        say(
            &channel,
            &ToSupervisor::Ready {
                version: VERSION,
                program: PROGRAM.into(),
                serves,
                tells_events: hears.events,
                confined,
            },
        );
        if let Some(standby) = standby {
            take_standby(&proxy, standby);
        }
        // One for each client of the supervisor, which also asks for itself, and those that are
        // about to end.
        let limits = Limits::default();
        let limits = Limits { connections: 2 * limits.connections, ..limits };
        let clients = Adopting::new(device, limits);
        Ok(Self {
            channel,
            hold,
            proxy,
            sessions,
            shutdown,
            clients,
            vault,
            orders,
            server,
            hand_off: None,
            footprints: Vec::new(),
            inflight,
        })
    }

    /// Until the end. Returns what had to be left.
    pub(super) fn carry_out(mut self, said: &mpsc::Receiver<Said>) -> Result<Vec<String>, String> {
        while let Ok(Said::Message(message, descriptors)) = said.recv() {
            if !self.command(message, descriptors) {
                return self.end();
            }
        }
        // The supervisor is gone, and its frontend may be served by another one at any moment.
        self.proxy.keep_claim();
        self.sessions.abandon();
        self.shutdown.begin("the supervisor is gone");
        self.end()
    }

    /// `false` if that was the end.
    fn command(&mut self, message: ToServer, descriptors: Vec<OwnedFd>) -> bool {
        let mut descriptors = descriptors.into_iter();
        match message {
            ToServer::Session(session) => self.begin_session(session, &mut descriptors),
            ToServer::Inflight(region) => {
                let leaves = region.leaves;
                match map(region, descriptors.next()) {
                    Ok(region) => self.inflight.set(Some(Inflight {
                        region: Arc::new(region),
                        cautious: false,
                        leaves,
                        quarantine: Vec::new(),
                    })),
                    Err(error) => log::error!("an in-flight region is not used: {error}"),
                }
                say(&self.channel, &ToSupervisor::InflightTaken);
            }
            ToServer::Client => {
                if let Some(stream) = descriptors.next() {
                    self.clients.adopt(UnixStream::from(stream));
                }
            }
            ToServer::Stop { drain_timeout_ms } => self.stop(drain_timeout_ms),
            ToServer::Resume => {
                let resume = self.hand_off.as_mut().and_then(|hand_off| hand_off.resume.take());
                match resume {
                    Some(resume) => _ = resume.send(()),
                    None => say(&self.channel, &ToSupervisor::Resumed),
                }
            }
            ToServer::Exit => leave_at_once(),
            ToServer::Shutdown { why } => {
                self.settle_hand_off();
                self.shutdown.begin(&why);
                return false;
            }
            ToServer::Ping { number } => {
                let stuck = self.stuck();
                say(&self.channel, &ToSupervisor::Pong { number, stuck });
            }
            ToServer::VaultAgain => {
                self.vault.forget();
                self.proxy.keep_again();
            }
            ToServer::Counters { .. } | ToServer::Start { .. } | ToServer::Activate { .. } => {
                log::error!("the supervisor starts a device that is there already");
            }
        }
        true
    }

    /// The queues whose worker has not come by since the last look.
    fn stuck(&mut self) -> Vec<u16> {
        let now = self.proxy.footprints();
        let is_stuck = |worker: &&Footprint| {
            self.footprints.iter().any(|before| worker.is_stuck_since(before))
        };
        let stuck = now.iter().filter(is_stuck).map(|worker| worker.queue as u16).collect();
        self.footprints = now;
        stuck
    }

    fn begin_session(&mut self, session: Session, descriptors: &mut impl Iterator<Item = OwnedFd>) {
        let number = session.number;
        let ended = |error: &str| ToSupervisor::SessionEnded { number, error: Some(error.into()) };
        let Some(listener) = descriptors.next() else {
            say(&self.channel, &ended("no listening socket came with it"));
            return;
        };
        let region = session.inflight.map(|place| map(place, descriptors.next())).transpose();
        let region = match region {
            Ok(region) => region,
            Err(error) => {
                say(&self.channel, &ended(&format!("its in-flight region: {error}")));
                return;
            }
        };
        let order = Order { session, listener: UnixListener::from(listener), region };
        if self.orders.send(order).is_err() {
            say(&self.channel, &ended("nothing serves sessions any more"));
        }
    }

    /// Has a thread give the device to another server.
    fn stop(&mut self, drain_timeout_ms: u64) {
        let (resume, resumed) = mpsc::channel();
        let options = Options {
            drain_timeout: Duration::from_millis(drain_timeout_ms),
            ..Options::default()
        };
        let began = Instant::now();
        let (news, heard) = mpsc::channel();
        let until_it_is_over = news.clone();
        let stopped: Arc<dyn Fn() -> Result<(), String> + Send + Sync> = {
            let (channel, hold, vault) =
                (Arc::clone(&self.channel), Arc::clone(&self.hold), Arc::clone(&self.vault));
            Arc::new(move || {
                vault.settle()?;
                hold.set(Hold::HandedOff);
                let drain_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                say(&channel, &ToSupervisor::Stopped { drain_ns });
                let _ = news.send(());
                Ok(())
            })
        };
        let (channel, hold, proxy) =
            (Arc::clone(&self.channel), Arc::clone(&self.hold), Arc::clone(&self.proxy));
        let hand_off = move || {
            let answer = match proxy.hand_off(options, stopped, resumed) {
                Ok(()) => {
                    hold.set(Hold::Serving);
                    ToSupervisor::Resumed
                }
                Err(refusal) => ToSupervisor::NotStopped {
                    code: refusal.code.as_str().to_owned(),
                    message: refusal.message,
                },
            };
            drop(until_it_is_over);
            say(&channel, &answer);
        };
        match std::thread::Builder::new().name("hand-off".to_owned()).spawn(hand_off) {
            Ok(_) => self.hand_off = Some(HandOff { resume: Some(resume), heard }),
            Err(error) => {
                let message = format!("no thread to stop: {}", how_to_have_more(&error));
                let code = "busy".to_owned();
                say(&self.channel, &ToSupervisor::NotStopped { code, message });
            }
        }
    }

    /// The supervisor wants the end: a hand-off that is under way comes to its own first. A device
    /// that is another's by then is left alone.
    fn settle_hand_off(&mut self) {
        let Some(HandOff { resume, heard }) = self.hand_off.take() else { return };
        while let Ok(()) = heard.recv() {
            if resume.is_some() {
                leave_at_once();
            }
        }
    }

    fn end(self) -> Result<Vec<String>, String> {
        let Self { proxy, clients, orders, server, hand_off, .. } = self;
        // It stops in this moment, and no other server has the device: it is this one's.
        drop(hand_off);
        drop(orders);
        if server.join().is_err() {
            log::error!("the thread that serves sessions has panicked");
        }
        drop(clients);
        Ok(proxy.stop())
    }
}

/// The region at a place of a memfd.
fn map(place: InflightRegion, memfd: Option<OwnedFd>) -> Result<Region, String> {
    let InflightRegion { offset, len, queues, queue_size, leaves: _ } = place;
    let memfd = memfd.ok_or("no memfd came with it")?;
    let region = Region::map(File::from(memfd), offset, len, queues, queue_size);
    region.map_err(|error| error.to_string())
}

fn quarantined(request: &channel::Quarantined) -> Quarantined {
    let &channel::Quarantined { queue, head, counter } = request;
    Quarantined { queue: usize::from(queue), head, counter }
}

/// Loads what is to stand by, beside what serves. A command that comes after this waits for it, so
/// a rollback finds it.
fn take_standby(proxy: &Arc<DomainProxy>, standby: KeptModule) {
    let proxy = Arc::clone(proxy);
    let (begun, has_begun) = mpsc::channel::<()>();
    let take = move || {
        if let Err(refusal) = proxy.take_standby(&standby, || drop(begun)) {
            log::warn!("there is no standby any more ({}): {refusal}", refusal.code);
        }
    };
    match std::thread::Builder::new().name("standby".to_owned()).spawn(take) {
        // Nothing is ever sent: the sender is dropped once the thread has the commands' turn.
        Ok(_) => drop(has_begun.recv()),
        Err(error) => log::warn!("no thread to load the standby: {error}"),
    }
}

/// How long the session of a server before may take to go on in this one.
const TO_COME_BACK: Duration = Duration::from_secs(10);

/// Serves one session after the other.
struct SessionService {
    channel: Arc<Channel>,
    proxy: Arc<DomainProxy>,
    config: SessionConfig,
    sessions: Arc<SessionHandle>,
    device: Arc<Device>,
    vault: Arc<VaultSender>,
}

impl SessionService {
    /// The server before may have claimed the disk, and its session may not go on, or with no ring.
    /// Sessions are not to wait for storage that does not answer.
    fn settle_claim_aside(&self) {
        let proxy = Arc::downgrade(&self.proxy);
        let settle = move || {
            std::thread::sleep(TO_COME_BACK);
            if let Some(proxy) = proxy.upgrade() {
                proxy.release_claim();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("settle".to_owned()).spawn(settle) {
            log::warn!("what a server before has claimed is not given back: {error}");
        }
    }

    fn serve_all(&self, orders: &mpsc::Receiver<Order>) {
        self.settle_claim_aside();
        while let Ok(Order { session, listener, region }) = orders.recv() {
            let (vault, number) = (Arc::clone(&self.vault), session.number);
            let before = self.vault.believed();
            let beginning = Beginning {
                resumed: (before.session == number).then_some(before.belief),
                believes: Some(Box::new(move |belief| {
                    vault.believes(Believed { session: number, belief });
                })),
            };
            self.config.inflight.set(region.map(|region| Inflight {
                region: Arc::new(region),
                cautious: session.cautious,
                leaves: session.inflight.is_some_and(|place| place.leaves),
                quarantine: session.quarantined.iter().map(quarantined).collect(),
            }));
            let served = session::serve_from(
                &self.proxy,
                &self.config,
                &listener,
                &self.sessions,
                self.device.connected(),
                beginning,
            );
            let error = match served {
                Ok(()) => None,
                Err(session::Failure { error, .. }) => Some(how_to_have_more(&error).to_string()),
            };
            say(&self.channel, &ToSupervisor::SessionEnded { number: session.number, error });
        }
    }
}
