use super::*;

/// A generator of numbers that is the same each time (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn exponential(&mut self) -> f64 {
        -(1.0 - self.next()).ln()
    }

    /// About the normal distribution.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.next()).sum::<f64>() - 6.0
    }
}

/// How times come about, in units of 100 us.
type Law = fn(&mut Random) -> f64;

const LAWS: [(&str, Law); 3] = [
    ("exponential", Random::exponential),
    ("with a long tail", |random| random.normal().exp()),
    ("of two kinds", |random| if random.next() < 0.02 { 30.0 } else { 1.0 + random.next() }),
];

fn times(random: &mut Random, law: Law, count: usize, factor: f64) -> Histogram {
    Histogram::of((0..count).map(|_| (law(random) * factor * 1e5) as u64))
}

/// Whether a canary of `looks` looks at `each` requests is found slow.
fn is_found_slow(
    random: &mut Random,
    law: Law,
    (before, looks, each): (usize, usize, usize),
    (factor, ratio): (f64, f64),
) -> bool {
    let mut class = Looks::new(&times(random, law, before, 1.0));
    let mut all = Histogram::default();
    for _ in 0..looks {
        all.add(&times(random, law, each, factor));
        if class.look(&all, ratio).is_some() {
            return true;
        }
    }
    class.found(&all).is_some_and(|found| found.is_slow(ratio))
}

#[test]
fn bounds_are_those_of_the_binomial_distribution() {
    // 0.99^916 > 1e-4 > 0.99^917.
    assert_eq!((bounds(916).0, bounds(917).0), (None, Some(0)));
    // Of 300, 11 or more are above with a chance of 0.00029, 12 or more with 0.00007.
    assert_eq!(bounds(300).1, Some(12));
    let (below, above) = bounds(1_000_000);
    let (below, above) = (below.unwrap() as f64, above.unwrap() as f64);
    // 3.72 standard deviations of 99.5 on either side of 10,000.
    assert!((below - 9_630.0).abs() < 5.0 && (above - 10_372.0).abs() < 5.0, "{below} {above}");
    assert_eq!(bounds(0), (None, None));
}

#[test]
fn bounds_of_many_are_never_tighter_than_those_of_the_distribution() {
    for n in (SUMMED..60_000).step_by(617).chain([100_000, 1_000_000, 3_000_000]) {
        let (below, above) = approximated(n);
        let (least, most) = summed(n);
        let (least, most) = (least.unwrap(), most.unwrap());
        assert!(below <= least && below + 2 >= least, "{n}: {below}, {least}");
        assert!(above >= most && above <= most + 2, "{n}: {above}, {most}");
    }
}

#[test]
fn a_look_costs_as_much_after_a_day_as_after_a_second() {
    let began = std::time::Instant::now();
    // A million in a second for a day, and all that can be counted.
    for n in [86_400_000_000, 1 << 60, u64::MAX] {
        let (below, above) = bounds(n);
        let (below, above) = (below.unwrap(), above.unwrap());
        assert!(below < n / 100 && above > n / 100 && above < n / 90, "{n}: {below}, {above}");
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(1), "{:?}", began.elapsed());
}

#[test]
fn one_that_is_as_slow_as_it_may_be_is_hardly_ever_taken_back() {
    let mut random = Random(0x5EED_0001);
    for (name, law) in LAWS {
        for shape in [(1_000, 20, 300), (5_000, 10, 1_000)] {
            for (factor, ratio) in [(1.0, 1.0), (2.0, 2.0)] {
                let trials = 1_000;
                let wrong = (0..trials)
                    .filter(|_| is_found_slow(&mut random, law, shape, (factor, ratio)))
                    .count();
                // The bound says 0.2 of a thousand.
                assert!(wrong <= 3, "{name}, {shape:?}, x {factor}: {wrong} of {trials}");
            }
        }
    }
}

#[test]
fn one_that_is_three_times_as_slow_is_found() {
    let mut random = Random(0x5EED_0002);
    for (name, law) in LAWS {
        let found = (0..100)
            .filter(|_| is_found_slow(&mut random, law, (20_000, 5, 5_000), (3.0, 2.0)))
            .count();
        assert!(found >= 99, "{name}: {found} of 100");
    }
}

#[test]
fn too_few_are_not_judged() {
    let mut random = Random(0x5EED_0003);
    let law: Law = |_| 1.0;
    for shape in [(916, 50, 1_000), (100_000, 1, 299)] {
        assert!(!is_found_slow(&mut random, law, shape, (1000.0, 1.0)), "{shape:?}");
    }
    assert!(is_found_slow(&mut random, law, (917, 1, 300), (1000.0, 1.0)));
}

#[test]
fn a_look_or_two_that_are_slow_are_believed_only_in_the_end() {
    let same = |factor: u64, count: usize| Histogram::of(vec![factor * 1_000_000; count]);
    let mut class = Looks::new(&same(1, 2_000));
    let mut all = Histogram::default();
    for round in 0..10 {
        for slow in [true, true, false] {
            all.add(&same(if slow { 10 } else { 1 }, 400));
            assert_eq!(class.look(&all, 2.0), None, "in round {round}");
        }
    }
    assert!(class.found(&all).is_some_and(|found| found.is_slow(2.0)));
    let mut found = None;
    for _ in 0..IN_A_ROW {
        all.add(&same(10, 400));
        found = class.look(&all, 2.0);
    }
    assert!(found.is_some_and(|found| found.ratio() > 8.0), "{found:?}");
}

#[test]
fn what_no_guest_feels_is_not_slow() {
    // Buckets of times are 1/16 wide.
    for (before, canary, is_slow) in [
        (2_000, 6_000, false),
        (2_000, 40_000, false),
        (2_000, 60_000, true),
        (40_000, 85_000, false),
        (40_000, 100_000, true),
        (1_000_000, 1_900_000, false),
        (1_000_000, 2_300_000, true),
    ] {
        let mut class = Looks::new(&Histogram::of(vec![before; 2_000]));
        let mut all = Histogram::default();
        let looks: Vec<_> = (0..IN_A_ROW)
            .map(|_| {
                all.add(&Histogram::of(vec![canary; 400]));
                class.look(&all, 2.0).is_some()
            })
            .collect();
        let expected = [false, false, is_slow];
        assert_eq!(looks, expected, "{before} and then {canary} ns");
        assert_eq!(class.found(&all).map(|found| found.is_slow(2.0)), Some(is_slow));
    }
}
