//! What must outlive the process: what its keeper is told, and a device that is given away for a
//! while.

use crate::common::{Device, PATIENCE};
use domain_abi::Capabilities;
use proxy::{Keeper, Kept, KeptModule, Options, State};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

/// Of all that was told: generation, schema, name, failure, fault, required.
type Told = (u64, u32, String, Option<String>, bool, u64);

/// Writes down what it is told, and what it was to expect.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<Told>>>, Arc<Mutex<Vec<Expected>>>);

/// Generation, instances' numbers of what serves and of the standby, the parameters of what serves.
type Expected = (u64, Option<u64>, Option<u64>, String);

fn expected(kept: &Kept) -> Expected {
    let number = |module: &Option<KeptModule>| module.as_ref().map(|module| module.number);
    (kept.generation, number(&kept.live), number(&kept.standby), format!("{:?}", kept.told))
}

impl Keeper for Notes {
    fn keep(&self, kept: &dyn Fn() -> Kept) {
        let mut notes = self.0.lock().unwrap();
        let mut soon = self.1.lock().unwrap();
        if soon.last() == Some(&expected(&kept())) {
            soon.push((0, None, None, "it came".to_owned()));
        }
        let Kept { generation, told, storage, fault, required, .. } = kept();
        let name = told.params.get("label").unwrap_or_default().to_owned();
        notes.push((
            generation,
            storage.schema,
            name,
            storage.failure,
            fault.is_some(),
            required.0,
        ));
    }

    fn expect(&self, soon: &Kept) {
        self.1.lock().unwrap().push(expected(soon));
    }
}

impl Notes {
    /// What was told since the last time.
    fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    fn last(&self) -> Told {
        self.0.lock().unwrap().last().cloned().expect("something was told")
    }
}

fn kept(device: &Device) -> Notes {
    let notes = Notes::default();
    device.proxy.keep_with(Box::new(notes.clone()), None);
    notes
}

#[test]
fn what_serves_and_what_it_has_made_of_the_storage_change_in_one_step() {
    for swap in ["swap=false", "swap=true"] {
        let device = Device::start(1, &[swap]);
        let notes = kept(&device);
        assert_eq!(notes.last(), (1, 1, "a".to_owned(), None, false, 0));
        device.upgrade("wide", "b", &[swap]).expect("it takes schema 1, and leaves schema 2");
        let told = notes.take();
        // It could not be gone on with: `a` does not take schema 2.
        let is_whole =
            |told: &Told| matches!((told.0, told.1, &*told.2), (1, 1, "a") | (2, 2, "b"));
        assert!(told.iter().all(is_whole), "{told:?}");
        assert_eq!(told.last().map(|told| told.0), Some(2), "{told:?}");
        // One that changes nothing of the storage is told of, too, and one that fails is not.
        device.upgrade("wide", "c", &[swap]).expect("committed");
        assert_eq!(notes.last(), (3, 2, "c".to_owned(), None, false, 0));
        device.upgrade("wide", "d", &["fail=activate", swap]).expect_err("it fails");
        assert!(notes.take().iter().all(|told| &*told.2 != "d"));
        device.proxy.require(Capabilities::FLUSH);
        assert_eq!(notes.last().5, Capabilities::FLUSH.0);
    }
}

#[test]
fn what_a_handover_will_tell_is_told_before() {
    let device = Device::start(1, &["swap=false"]);
    let notes = kept(&device);
    device.upgrade("plain", "x", &["fail=activate", "swap=false"]).expect_err("it fails");
    let came = |notes: &Notes| {
        let soon = std::mem::take(&mut *notes.1.lock().unwrap());
        soon.last().is_some_and(|(.., what)| what == "it came")
    };
    assert!(!came(&notes), "it never serves");
    for label in ["b", "c"] {
        device.upgrade("wide", label, &["swap=false"]).expect("committed");
        assert!(came(&notes), "{label} was not expected as it came");
    }
}

#[test]
fn a_takeover_and_a_fault_are_told() {
    let device = Device::start(1, &[]);
    let notes = kept(&device);
    device.upgrade("plain", "b", &["die_at=1"]).expect("committed");
    let mut hand = device.worker(0);
    hand.submit([0]);
    hand.until(&device, "no takeover", |hand| hand.ended.len() == 1);
    device.until("it is not told", || (notes.last().0, &*notes.last().2) == (3, "a"));
    device.upgrade("plain", "c", &["die_at=1"]).ok();
    let device = Device::start(1, &["die_at=1"]);
    let notes = kept(&device);
    let mut hand = device.worker(0);
    hand.submit([0]);
    hand.until(&device, "silence", |hand| hand.ended.len() == 1);
    device.until("it is not told", || notes.last().4);
    drop(hand);
    device.upgrade("plain", "b", &[]).expect("revived");
    assert_eq!((notes.last().0, notes.last().4), (2, false));
}

#[test]
fn a_device_that_is_given_away_stands_still_until_it_is_called_back() {
    let device = Device::start(1, &["hold=false"]);
    let notes = kept(&device);
    let mut hand = device.worker(0);
    let (resume, resumed) = mpsc::channel();
    let (tell, stopped) = mpsc::channel();
    std::thread::scope(|scope| {
        let proxy = Arc::clone(&device.proxy);
        let handed_off = scope.spawn(move || {
            let tell = move || {
                tell.send(()).expect("it is waited for");
                Ok(())
            };
            let tell = Arc::new(tell);
            proxy.hand_off(Options::default(), tell, resumed)
        });
        let device = &device;
        let worker = scope.spawn(move || {
            // Comes back from the gate when it opens.
            hand.until(device, "the gate opens", |_| device.stage.lines("a", "resume").len() == 1);
            hand.submit([3]);
            hand.until(device, "no answer", |hand| hand.ended.len() == 1);
        });
        stopped.recv_timeout(PATIENCE).expect("it is stopped");
        assert_eq!(device.stage.lines("a", "quiesce").len(), 1);
        assert!(!notes.take().is_empty(), "what quiescing has left is told before");
        std::thread::sleep(Duration::from_millis(50));
        assert!(!worker.is_finished() && device.stage.lines("a", "resume").is_empty());
        resume.send(()).expect("it waits");
        handed_off.join().unwrap().expect("it is back");
        worker.join().unwrap();
    });
    assert_eq!(device.proxy.status().state, State::Serving);
    device.upgrade("plain", "b", &[]).expect("changes are made again");
}

/// The frontend is held meanwhile.
#[test]
fn a_device_is_not_given_away_while_another_change_takes_its_time() {
    let device = Device::start(1, &[]);
    let given_away = |drain_timeout| {
        let (tell, told) = mpsc::channel();
        let (proxy, options) =
            (Arc::clone(&device.proxy), Options { drain_timeout, ..Options::default() });
        std::thread::spawn(move || {
            // It is called back at once.
            let (_, resumed) = mpsc::channel();
            let _ = tell.send(proxy.hand_off(options, Arc::new(|| Ok(())), resumed));
        });
        told
    };
    std::thread::scope(|scope| {
        let change = scope.spawn(|| device.upgrade("plain", "b", &["wait=prepare"]));
        device.until("not begun", || device.proxy.status().state == State::Upgrading);
        let refused = given_away(Duration::from_millis(20)).recv_timeout(PATIENCE);
        let waits = given_away(PATIENCE);
        let too_soon = waits.recv_timeout(Duration::from_millis(50));
        device.stage.go.store(true, std::sync::atomic::Ordering::Release);
        change.join().unwrap().expect("committed");
        let refusal = refused.expect("it is not waited for").expect_err("a change is under way");
        assert_eq!(refusal.code.as_str(), "busy");
        assert!(too_soon.is_err(), "it came between");
        waits.recv_timeout(2 * PATIENCE).expect("a quick change").expect("it is given away");
    });
}

#[test]
fn a_device_that_cannot_be_stopped_is_not_given_away() {
    let never = || Arc::new(|| -> Result<(), String> { panic!("it is not stopped") });
    for (fault, code) in [("fail=quiesce", "quiesce_failed"), ("break=quiesce", "quiesce_panicked")]
    {
        let device = Device::start(1, &[fault]);
        let (_resume, resumed) = mpsc::channel();
        let refusal = device.proxy.hand_off(Options::default(), never(), resumed).unwrap_err();
        assert!(refusal.code.as_str() == code || refusal.code.as_str() == "preempted", "{refusal}");
    }
    let device = Device::start(1, &["hold=true"]);
    let mut hand = device.worker(0);
    hand.submit([0]);
    while !hand.worker.sleep() {}
    let options = Options { drain_timeout: Duration::from_millis(20), ..Options::default() };
    let (_resume, resumed) = mpsc::channel();
    let refusal = std::thread::scope(|scope| {
        let hand_off = || device.proxy.hand_off(options, never(), resumed);
        scope.spawn(hand_off).join().unwrap().unwrap_err()
    });
    assert_eq!(refusal.code.as_str(), "drain_timeout");
    device.stage.release.store(true, std::sync::atomic::Ordering::Release);
    hand.until(&device, "no answer", |hand| hand.ended.len() == 1);
}

/// The other process would go on with what was there before.
#[test]
fn a_device_of_which_another_process_is_not_told_is_not_given_away() {
    let device = Device::start(1, &["hold=false"]);
    // It is called back at once.
    let (_, resumed) = mpsc::channel();
    let untold = Arc::new(|| Err("there is no descriptor".to_owned()));
    let refusal = device.proxy.hand_off(Options::default(), untold, resumed).unwrap_err();
    assert_eq!(refusal.code.as_str(), "quiesce_failed");
    assert!(refusal.message.contains("there is no descriptor"), "{refusal}");
    let lines = |call| device.stage.lines("a", call).len();
    assert_eq!((lines("quiesce"), lines("resume")), (1, 1), "it serves on");
    assert_eq!(device.proxy.status().state, State::Serving);
    device.upgrade("plain", "b", &[]).expect("changes are made again");
}

#[test]
fn a_worker_that_has_not_come_by_is_told_from_one_that_rests() {
    let device = Device::start(1, &[]);
    let mut hand = device.worker(0);
    let look = || device.proxy.footprints().pop().expect("a worker");
    hand.step();
    let before = look();
    let spin = std::time::Instant::now();
    while spin.elapsed() < Duration::from_millis(300) {
        std::hint::spin_loop();
    }
    assert!(look().is_stuck_since(&before), "it has had a CPU, and has not come by");
    hand.step();
    assert!(!look().is_stuck_since(&before));
    let before = look();
    while !hand.worker.sleep() {}
    assert!(!look().is_stuck_since(&before));
    let before = look();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!look().is_stuck_since(&before), "it sleeps");
}
