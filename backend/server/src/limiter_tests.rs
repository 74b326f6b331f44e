use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn limits(iops: u64, bandwidth: u64) -> LimitRequest {
    LimitRequest { iops: Some(iops), bandwidth: Some(bandwidth), ..LimitRequest::default() }
}

/// What requests of `len` bytes cost.
fn batch(kind: u32, len: u64, count: usize) -> Vec<Option<f64>> {
    vec![cost(kind, len); count]
}

fn admit(limiter: &Limiter, batch: &[Option<f64>], now: Instant) -> Admitted {
    limiter.let_through(batch.iter().copied(), now)
}

/// How much is let through from `from` on in `time`, when it is asked for as soon as it may be, and
/// `late` after that.
fn run(
    limiter: &Limiter,
    batch: &[Option<f64>],
    from: Instant,
    time: Duration,
    late: Duration,
) -> usize {
    let (mut now, mut let_through) = (from, 0);
    while now < from + time {
        let admitted = admit(limiter, batch, now);
        let_through += admitted.requests;
        now = admitted.next.map_or(now, |next| next + late);
    }
    let_through
}

#[test]
fn over_ten_seconds_it_is_the_rate_whatever_the_wake_ups_are() {
    for (rate, len) in [(1, 512), (100, 4096), (5_000, 4096), (200_000, 512)] {
        for late_us in [0, 70, 3_000, 20_000] {
            let limiter = Limiter::default();
            limiter.change(&limits(rate, 0)).unwrap();
            let (now, late) = (Instant::now() + SECOND, Duration::from_micros(late_us));
            let through = run(&limiter, &batch(op::READ, len, 16), now, 10 * SECOND, late) as f64;
            let (wanted, burst) = (10.0 * rate as f64, limiter.limits().iops_burst as f64);
            assert!(through <= wanted + burst + 1.0, "{rate}, {late_us} us late: {through}");
            assert!(through >= wanted * 0.97 - 1.0, "{rate}, {late_us} us late: {through}");
        }
    }
}

#[test]
fn bytes_are_counted_as_well_and_a_large_request_goes_into_debt() {
    for (kind, len) in [(op::READ, 4096), (op::WRITE, 65536), (op::WRITE, 1 << 20)] {
        let limiter = Limiter::default();
        limiter.change(&limits(0, 1 << 20)).unwrap();
        let now = Instant::now();
        let through = run(&limiter, &batch(kind, len, 16), now, 20 * SECOND, Duration::ZERO) as u64;
        let most = 20 * (1 << 20) + limiter.limits().bandwidth_burst + len;
        assert!(through * len <= most, "{kind} of {len}: {through}");
        assert!(through * len >= 19 * (1 << 20), "{kind} of {len}: {through}");
    }
    // A thousand times the bucket: let through, and paid for afterwards.
    let limiter = Limiter::default();
    limiter.change(&limits(0, 4096)).unwrap();
    let (huge, now) = (batch(op::READ, 409_600, 2), Instant::now());
    let admitted = admit(&limiter, &huge, now);
    assert_eq!(admitted.requests, 1);
    let waits = admitted.next.unwrap() - now;
    assert!(waits > 99 * SECOND && waits < 101 * SECOND, "{waits:?}");
}

#[test]
fn the_stricter_of_two_limits_counts() {
    let limiter = Limiter::default();
    limiter.change(&limits(100, 4096 * 1000)).unwrap();
    let now = Instant::now();
    let through = run(&limiter, &batch(op::READ, 4096, 16), now, 10 * SECOND, Duration::ZERO);
    assert!((1000..=1011).contains(&through), "{through}");
    limiter.change(&limits(1000, 4096 * 100)).unwrap();
    let from = now + 20 * SECOND;
    let through = run(&limiter, &batch(op::READ, 4096, 16), from, 10 * SECOND, Duration::ZERO);
    assert!((1000..=1011).contains(&through), "{through}");
}

#[test]
fn a_flush_is_free_and_a_discard_has_no_bytes() {
    let limiter = Limiter::default();
    limiter.change(&limits(1, 4096)).unwrap();
    let now = Instant::now();
    let mut mixed = batch(op::READ, 1 << 20, 1);
    mixed.extend(batch(op::FLUSH, 0, 3));
    mixed.extend(batch(op::WRITE, 512, 1));
    let admitted = admit(&limiter, &mixed, now);
    assert_eq!(admitted.requests, 4, "the flushes pass with nothing left, the write does not");
    assert_eq!(
        admit(&limiter, &batch(op::FLUSH, 0, 16), now),
        Admitted { requests: 16, next: None }
    );
    let limiter = Limiter::default();
    limiter.change(&limits(0, 4096)).unwrap();
    assert_eq!(admit(&limiter, &batch(op::DISCARD, 1 << 30, 16), now).requests, 16);
    limiter.change(&limits(10, 0)).unwrap();
    assert_eq!(admit(&limiter, &batch(op::WRITE_ZEROES, 1 << 30, 16), now).requests, 1);
}

#[test]
fn zeros_that_are_written_cost_what_other_data_does() {
    let limiter = Limiter::default();
    limiter.change(&limits(0, 1 << 20)).unwrap();
    let (zeros, now) = (batch(op::WRITE_ZEROES, 16 << 20, 16), Instant::now());
    let admitted = admit(&limiter, &zeros, now);
    assert!(admitted.requests == 1 && admitted.next.is_some(), "{admitted:?}");
    let through = run(&limiter, &zeros, now, 64 * SECOND, Duration::ZERO);
    assert!((3..=5).contains(&through), "{through} of 16 MiB in 64 s, at 1 MiB in a second");
}

#[test]
fn what_the_domain_does_not_take_is_not_counted() {
    let limiter = Limiter::default();
    limiter.change(&limits(50, 0)).unwrap();
    let (all, now) = (batch(op::READ, 512, 8), Instant::now());
    assert_eq!(admit(&limiter, &all, now).requests, 5);
    limiter.take_back(all[1..5].iter().copied());
    assert_eq!(admit(&limiter, &all, now).requests, 4);
}

#[test]
fn a_change_holds_at_once_and_forgives_debts() {
    let limiter = Limiter::new(RateLimits::default());
    assert!(!limiter.is_on());
    assert_eq!(limiter.report(), Value::Null);
    limiter.change(&limits(0, 4096)).unwrap();
    assert!(limiter.is_on());
    let (huge, now) = (batch(op::READ, 1 << 30, 2), Instant::now());
    assert_eq!(admit(&limiter, &huge, now).requests, 1);
    limiter.change(&limits(0, 1 << 20)).unwrap();
    let next = admit(&limiter, &huge, Instant::now()).next;
    assert!(next.is_none_or(|next| next < Instant::now() + SECOND), "days of debt: {next:?}");
    let told = json!({"iops": null, "iops_burst": null, "bandwidth": 1 << 20,
                      "bandwidth_burst": (1 << 20) / 10, "held_up": limiter.report()["held_up"]});
    assert_eq!(limiter.report(), told);
    limiter.change(&LimitRequest { off: true, ..LimitRequest::default() }).unwrap();
    assert!(!limiter.is_on());
}

/// An operator who looks at the limits, or changes another one, gives the guest nothing.
#[test]
fn a_debt_stays_where_its_limit_does() {
    let limiter = Limiter::default();
    limiter.change(&limits(0, 4096)).unwrap();
    let (huge, now) = (batch(op::READ, 1 << 30, 2), Instant::now());
    assert_eq!(admit(&limiter, &huge, now).requests, 1);
    let told = std::sync::Arc::new(AtomicBool::new(false));
    let tells = std::sync::Arc::clone(&told);
    limiter.on_change(move |_| tells.store(true, Ordering::Relaxed));
    for same in [LimitRequest::default(), limits(0, 4096)] {
        assert!(!limiter.change(&same).unwrap());
        assert_eq!(admit(&limiter, &huge, Instant::now()).requests, 0, "{same:?}");
    }
    assert!(!told.load(Ordering::Relaxed), "nothing has changed");
    assert!(limiter.change(&LimitRequest { iops: Some(10), ..LimitRequest::default() }).unwrap());
    assert_eq!(admit(&limiter, &huge, Instant::now()).requests, 0);
}

#[test]
fn two_changes_at_a_time_are_both_made() {
    let both = |iops, bandwidth| {
        let limiter = Limiter::default();
        let ready = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for request in [
                LimitRequest { iops: Some(iops), ..LimitRequest::default() },
                LimitRequest { bandwidth: Some(bandwidth), ..LimitRequest::default() },
            ] {
                let (limiter, ready) = (&limiter, &ready);
                scope.spawn(move || {
                    ready.wait();
                    limiter.change(&request).unwrap();
                });
            }
        });
        (limiter.limits().iops, limiter.limits().bandwidth)
    };
    for round in 1..=2_000 {
        assert_eq!(both(round, round << 20), (round, round << 20), "in round {round}");
    }
}

#[test]
fn what_is_told_last_is_what_holds() {
    let (limiter, told) = (Limiter::default(), std::sync::Arc::<Mutex<Vec<u64>>>::default());
    let (enter, entered) = std::sync::mpsc::channel();
    let list = std::sync::Arc::clone(&told);
    limiter.on_change(move |limits| {
        if limits.iops == 1 {
            enter.send(()).unwrap();
            // The other one has all the time to come before it.
            std::thread::sleep(Duration::from_millis(200));
        }
        lock(&list).push(limits.iops);
    });
    std::thread::scope(|scope| {
        scope.spawn(|| limiter.change(&limits(1, 0)).unwrap());
        entered.recv().unwrap();
        limiter.change(&limits(2, 0)).unwrap();
    });
    assert_eq!((lock(&told).as_slice(), limiter.limits().iops), (&[1, 2][..], 2));
}

#[test]
fn what_is_not_said_stays_and_what_makes_no_sense_is_refused() {
    let none = RateLimits::default();
    let some =
        RateLimits { iops: 100, iops_burst: 50, bandwidth: 1 << 20, bandwidth_burst: 1 << 20 };
    let ask = LimitRequest::default();
    assert_eq!(changed(some, &ask), Ok(some));
    assert_eq!(changed(none, &ask), Ok(none));
    let more = LimitRequest { iops: Some(1000), ..ask };
    assert_eq!(changed(some, &more), Ok(RateLimits { iops: 1000, iops_burst: 100, ..some }));
    let burst = LimitRequest { iops_burst: Some(7), ..ask };
    assert_eq!(changed(some, &burst), Ok(RateLimits { iops_burst: 7, ..some }));
    let no_iops = LimitRequest { iops: Some(0), ..ask };
    assert_eq!(changed(some, &no_iops), Ok(RateLimits { iops: 0, iops_burst: 0, ..some }));
    let anew = LimitRequest { off: true, iops: Some(5), ..ask };
    assert_eq!(changed(some, &anew), Ok(RateLimits { iops: 5, iops_burst: 1, ..none }));
    for (bad, word) in [
        (LimitRequest { iops_burst: Some(1), ..ask }, "`iops-burst`"),
        (LimitRequest { iops: Some(0), iops_burst: Some(1), ..ask }, "`iops-burst`"),
        (LimitRequest { iops: Some(u64::MAX), ..ask }, "`iops`"),
        (LimitRequest { iops: Some(1000), iops_burst: Some(9), ..ask }, "hundredth"),
        (LimitRequest { iops: Some(10), iops_burst: Some(36_001), ..ask }, "an hour"),
        (LimitRequest { bandwidth: Some(4095), ..ask }, "4096"),
        (LimitRequest { bandwidth: Some((1 << 50) + 1), ..ask }, "`bandwidth`"),
        (LimitRequest { bandwidth: Some(1 << 20), bandwidth_burst: Some(0), ..ask }, "burst"),
    ] {
        let refused = changed(none, &bad).unwrap_err();
        assert!(refused.contains(word), "{bad:?}: {refused}");
    }
}

#[test]
fn a_command_line_has_limits_that_can_be() {
    use crate::args::{Args, Invocation};
    let parse = |line: &str| {
        let words = format!("vhost-hotswap --socket-path s {line}");
        Args::parse_from(words.split_whitespace())
    };
    let limits = |line: &str| match parse(line) {
        Ok(Invocation::Serve(config)) => config.limits,
        other => panic!("{line}: {other:?}"),
    };
    let expected =
        RateLimits { iops: 100, iops_burst: 10, bandwidth: 1 << 20, bandwidth_burst: 2 << 20 };
    assert_eq!(limits("--iops 100 --bandwidth 1M --bandwidth-burst 2M"), expected);
    assert_eq!(limits("--iops 0"), RateLimits::default());
    for (bad, word) in [
        ("--iops x", "--iops"),
        ("--iops-burst 5", "iops-burst"),
        ("--bandwidth 1", "4096"),
        ("--bandwidth 1Q", "K, M, G or T"),
        ("--iops 1000 --iops-burst 1", "hundredth"),
    ] {
        let error = parse(bad).expect_err(bad);
        assert_eq!(error.exit_code(), 2, "{bad}");
        assert!(error.to_string().contains(word), "{bad}: {error}");
    }
}
