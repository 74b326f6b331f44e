#!/usr/bin/env bash
# The Rust crate vhost-user-backend answers 0 to a SET_VRING_NUM of a size that is no power of two,
# and goes on with another size.
#
# Seen with vhost-user-backend 0.24.0, vhost 0.18.0 and virtio-queue 0.18.0: a frontend sets the
# size of a ring to 100, which virtio 1.0 forbids for split rings and QEMU 7.2 and 11.1 pass on
# (queue-size=100). The request is acknowledged (REPLY_ACK), the queue only logs an error, and the
# ring that the device is given has the largest size, 256 here. A size of 128 is taken.
#
# So the driver has 100 entries and the device 256: they disagree about the place of everything
# behind the first 100. A backend has to look at Queue::size when a ring starts, and refuse it.
#
# Needs cargo, and takes the crates above from crates.io. Exit 0: seen as described. 1: something
# else was seen. 77: cannot be tried here.
set -euo pipefail
command -v cargo >/dev/null || { echo "needs cargo"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rustc --version
mkdir "$work/src"
cat >"$work/Cargo.toml" <<'TOML'
[package]
name = "try"
version = "0.0.0"
edition = "2024"

[dependencies]
vhost = { version = "=0.18.0", features = ["vhost-user-backend", "vhost-user-frontend"] }
vhost-user-backend = "=0.24.0"
virtio-queue = "=0.18.0"
vm-memory = { version = "0.18", features = ["backend-mmap", "backend-atomic"] }
vmm-sys-util = "0.15"
TOML
cat >"$work/src/main.rs" <<'RS'
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
use vhost::VhostBackend;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

struct Device(Mutex<mpsc::Sender<u16>>);

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _: bool) {}

    fn update_memory(&self, _: Memory) -> std::io::Result<()> {
        Ok(())
    }

    fn handle_event(
        &self,
        _: u16,
        _: EventSet,
        vrings: &[VringRwLock],
        _: usize,
    ) -> std::io::Result<()> {
        let size = vrings[0].get_ref().get_queue().size();
        self.0.lock().unwrap().send(size).unwrap();
        Ok(())
    }
}

/// How the request is answered, and the size that the device sees when the ring is kicked.
fn try_size(path: &str, size: u16) -> (bool, u16) {
    let (seen, sizes) = mpsc::channel();
    let device = Arc::new(Device(Mutex::new(seen)));
    let memory = Memory::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("try".into(), device, memory).unwrap();
    let mut listener = Listener::new(path, true).unwrap();
    std::thread::spawn(move || {
        daemon.start(&mut listener).unwrap();
        let _ = daemon.wait();
    });
    let mut frontend = Frontend::connect(path, 1).unwrap();
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    frontend.set_features(features).unwrap();
    frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(VhostUserProtocolFeatures::REPLY_ACK).unwrap();
    // Every request from here on is acknowledged or refused.
    frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    let answer = frontend.set_vring_num(0, size).is_ok();
    let kick = EventFd::new(0).unwrap();
    frontend.set_vring_kick(0, &kick).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    kick.write(1).unwrap();
    let seen = sizes.recv_timeout(Duration::from_secs(10)).expect("a kick");
    drop(frontend);
    (answer, seen)
}

fn main() {
    let directory = std::env::args().nth(1).unwrap();
    let tried = [128, 100].map(|size| {
        let (answer, seen) = try_size(&format!("{directory}/socket-{size}"), size);
        println!("size {size}: acknowledged: {answer}, the device's ring has {seen} entries");
        (size, answer, seen)
    });
    let described = tried == [(128, true, 128), (100, true, 256)];
    std::process::exit(i32::from(!described));
}
RS
cd "$work"
cargo build --quiet --release || { echo "the crates cannot be had"; exit 77; }
timeout 60 target/release/try "$work"
