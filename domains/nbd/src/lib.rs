//! A disk behind an NBD server: `qemu-nbd`, `qemu-storage-daemon`, `nbdkit`, `nbd-server`.
//!
//! The data is the server's. What is here is the connection to it, which lies in storage while it
//! has nothing in flight, so an upgrade takes it along and the server notices nothing. Where the
//! server ends or a connection breaks, requests wait, are sent again on the next one, and the guest
//! sees a slow disk.
//!
//! - [`uri`], [`negotiate`], [`wire`]: the protocol, without sockets;
//! - `connect`, `keeper`: having connections; `link`, `outgoing`: using one; `pool`, `port`: using
//!   several;
//! - `own_flush`: the flush that is due when the write cache is turned off;
//! - `marks`, `old`, `answers`: what a broken connection may still change, and what has to wait for
//!   that;
//! - `disk`: what requests map to; what is in flight is the engine's (`domain_io::engine`).
//!
//! Requests are never sent with FUA, because not each server that takes it is durable then: what a
//! guest wants durable is a FLUSH.

#![forbid(unsafe_code)]

mod announced;
mod answers;
mod common;
mod connect;
mod disk;
mod job;
mod keeper;
mod link;
mod marks;
pub mod negotiate;
mod old;
mod outgoing;
mod own_flush;
mod pool;
mod port;
mod server;
mod taking;
pub mod uri;
pub mod wire;

use announced::Announced;
use common::Options;
use disk::Disk;
use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Params,
    QueueContext, Swap,
};
use domain_io::engine::{Engine, Queue};
use pool::Pool;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use taking::First;
use uri::Target;

/// The disk behind a server.
#[derive(Debug)]
pub struct NbdDisk {
    host: Host,
    engine: Engine<Disk>,
    serial: String,
    uri: String,
    first: First,
}

impl BlockDomain for NbdDisk {
    const NAME: &'static str = "nbd";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "nbd";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] =
        &["uri", "readonly", "serial", "timeout", "settle", "connections", "no_flush"];
    const INHERITED: &'static [&'static str] = Self::PARAMS;

    type Queue = Queue<Disk>;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let uri = params.get("uri").filter(|uri| !uri.is_empty()).ok_or_else(|| {
            DomainError::new(
                "parameter `uri` is missing; name an export with uri=nbd+unix:///EXPORT?socket=PATH or uri=nbd://HOST:PORT/EXPORT",
            )
        })?;
        let target = Target::parse(uri).map_err(DomainError::new)?;
        let options = options(params)?;
        let (read_only, no_flush) =
            (params.flag("readonly", false)?, params.flag("no_flush", false)?);
        let serial = params.serial()?;
        let (announced, first) = match Announced::inherited(host) {
            Some(announced) => {
                taking::check_same(host, uri, &announced, read_only)?;
                (announced, First::default())
            }
            None => taking::first(&target, read_only, no_flush)?,
        };
        let pool = Pool::new(host, target, options, announced).map(Arc::new).map_err(|error| {
            DomainError::new(format!("no descriptor for the keeper of connections: {error}"))
        })?;
        keeper::start(&pool)?;
        let engine = Engine::new(host, Disk::new(host, pool));
        Ok(Self { host, engine, serial, uri: uri.to_owned(), first })
    }

    fn info(&self) -> DeviceInfo {
        let announced = Announced::inherited(self.host).unwrap_or_else(|| self.pool().announced());
        let capability = |has: bool, one: Capabilities| if has { one } else { Capabilities(0) };
        DeviceInfo {
            capacity: announced.capacity,
            block_size: announced.block_size,
            physical_block_size: announced.physical_block_size,
            optimal_io_size: 0,
            discard_granularity: announced.physical_block_size,
            capabilities: capability(announced.read_only, Capabilities::READ_ONLY)
                .with(capability(announced.flush, Capabilities::FLUSH))
                .with(capability(
                    announced.flush && !announced.read_only,
                    Capabilities::WRITE_CACHE,
                ))
                .with(capability(announced.discard, Capabilities::DISCARD))
                .with(capability(announced.write_zeroes, Capabilities::WRITE_ZEROES)),
            swap: Swap::No,
            backing_kind: "nbd".to_owned(),
            backing_id: self.pool().target.id(),
            backing_cache: 0,
            serial: self.serial.clone(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        taking::take_up(self.pool(), &self.uri, &self.first)?;
        let storage = self.host.storage();
        if storage.schema() == Self::SCHEMA { Ok(()) } else { storage.set_schema(Self::SCHEMA) }
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        taking::hand_on(self.pool()).inspect_err(|_| {
            // It goes on; what cannot be taken up is made anew.
            let _ = taking::take_up(self.pool(), &self.uri, &self.first);
        })
    }

    fn resume(&self) -> Result<(), DomainError> {
        taking::take_up(self.pool(), &self.uri, &self.first)
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        taking::resize(self.pool(), capacity)
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue<Disk>, DomainError> {
        Ok(self.engine.attach(context.queue))
    }

    fn detach_queue(&self, queue: Queue<Disk>) {
        self.engine.detach(queue);
    }

    fn submit(
        &self,
        queue: &mut Queue<Disk>,
        batch: &mut Batch<'_>,
        completions: &mut Completions<'_>,
    ) {
        self.engine.submit(queue, batch, completions);
    }

    fn reap(&self, queue: &mut Queue<Disk>, completions: &mut Completions<'_>) {
        self.engine.reap(queue, completions);
    }

    fn cancel(&self) {
        self.engine.cancel();
    }

    fn set_write_cache(&self, on: bool) {
        self.engine.backend().set_write_cache(on);
    }
}

impl NbdDisk {
    fn pool(&self) -> &Arc<Pool> {
        self.engine.backend().pool()
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        let pool = self.pool();
        pool.ending.store(true, Ordering::Relaxed);
        pool.wake_keeper();
    }
}

fn options(params: &Params) -> Result<Options, DomainError> {
    let number = |key: &str, default: u64, most: u64, what: &str| {
        let Some(text) = params.get(key) else { return Ok(default) };
        text.parse().ok().filter(|number| *number <= most).ok_or_else(|| {
            DomainError::new(format!("parameter `{key}` is `{text}`; it must be {what}"))
        })
    };
    const DAY: u64 = 24 * 60 * 60;
    let timeout = number("timeout", 0, DAY, "a number of seconds, or 0 to wait for ever")?;
    let settle = number("settle", 30, DAY, "a number of seconds")?;
    let most = marks::LINKS as u64;
    let connections = number("connections", 4, most, "a number of connections, 1 to 16")?;
    if connections == 0 {
        return Err(DomainError::new("parameter `connections` is `0`; it must be 1 to 16"));
    }
    Ok(Options {
        settle: Duration::from_secs(settle),
        timeout: (timeout > 0).then(|| Duration::from_secs(timeout)),
        connections: connections as usize,
    })
}

domain_api::export_domain!(NbdDisk);
