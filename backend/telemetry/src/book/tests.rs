use super::*;
use serde_json::json;
use std::fs;

fn event(name: &str, number: usize) -> Map<String, Value> {
    let event = json!({"event": name, "change": "upgrade", "generation": number});
    event.as_object().unwrap().clone()
}

fn numbers(book: &Book) -> Vec<u64> {
    book.after(0).map(|record| record.sequence).collect()
}

#[test]
fn the_newest_of_each_kind_are_kept_and_numbers_go_on() {
    let mut book = Book::default();
    book.note(event("ended", 0));
    for number in 0..2 * KEPT {
        book.note(event("connected", number));
    }
    book.skip_to(9_000);
    assert_eq!(book.note(event("ended", 1)), 9_001);
    assert_eq!(book.after(0).count(), KEPT + 2);
    let told = json!([
        {"change": "upgrade", "generation": 0, "sequence": 1},
        {"change": "upgrade", "generation": 1, "sequence": 9_001},
    ]);
    assert_eq!(book.history(), told);
    assert_eq!(book.after(2 * KEPT as u64).map(|it| it.sequence).collect::<Vec<_>>(), [2049, 9001]);
    let next = Book::unpack(book.pack(), None);
    assert_eq!((next.history(), next.last()), (told, 9_001));
}

#[test]
fn a_file_is_gone_on_with_and_another_daemon_has_another() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b");
    let mut book = Book::open(&path).unwrap();
    book.note(event("ended", 1));
    book.note(event("connected", 2));
    let refused = Book::open(&path).unwrap_err();
    assert!(refused.contains("in use by another daemon"), "{refused}");
    // Another program of the same process holds the lock on.
    let held = book.directory().unwrap().try_clone_to_owned().unwrap();
    let mut next = Book::unpack(book.pack(), Some(held));
    drop(book);
    assert!(Book::open(&path).is_err());
    next.note(event("ended", 3));
    drop(next);
    let book = Book::open(&path).unwrap();
    assert_eq!((numbers(&book), book.last()), (vec![1, 2, 3], 3));
    assert_eq!(book.history()[1]["generation"], 3);
}

#[test]
fn a_torn_tail_and_lines_that_are_no_records_are_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = Book::open(directory.path()).unwrap();
    for number in 1..=3 {
        book.note(event("ended", number));
    }
    drop(book);
    let path = directory.path().join(NAME);
    let whole = fs::read(&path).unwrap();
    let last = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
    // Cut off at each byte of the last line.
    for len in last..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        let mut book = Book::open(directory.path()).unwrap();
        // Only its line's end is missing in the last of them.
        let expected: &[u64] = if len == whole.len() - 1 { &[1, 2, 3] } else { &[1, 2] };
        assert_eq!(numbers(&book), expected, "cut off at {len}");
        book.note(event("ended", 9));
        drop(book);
        let book = Book::open(directory.path()).unwrap();
        assert_eq!(numbers(&book).len(), expected.len() + 1, "cut off at {len}");
    }
    let odd = [&b"\0\xff{}\n[]\n{\"sequence\":1}\n"[..], &whole[..last], &whole[..last]].concat();
    fs::write(&path, odd).unwrap();
    let book = Book::open(directory.path()).unwrap();
    assert_eq!(numbers(&book), [1, 2], "numbers that came before are no news");
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
}

/// The directory, open, with something else where the new file is to be written.
fn spoiled(directory: &Path, how: impl FnOnce(&Path)) -> OwnedFd {
    how(&directory.join("history.jsonl.new"));
    File::open(directory).unwrap().into()
}

#[test]
fn a_disk_that_stalls_holds_nothing_up() {
    let directory = tempfile::tempdir().unwrap();
    // It is opened for writing when there is a reader.
    let held = spoiled(directory.path(), |path| {
        rustix::fs::mkfifoat(rustix::fs::CWD, path, Mode::from_raw_mode(0o600)).unwrap();
    });
    let (done, is_done) = std::sync::mpsc::channel();
    let path = directory.path().to_owned();
    std::thread::spawn(move || {
        let mut book = Book::unpack(Packed::default(), Some(held));
        for number in 1..=600 {
            let mut event = event("ended", number);
            event.insert("why".to_owned(), "x".repeat(4 << 10).into());
            book.note(event);
        }
        assert!(!book.rest(Duration::from_millis(10)), "it is not written yet");
        done.send(book).unwrap();
    });
    let mut book = is_done.recv_timeout(Duration::from_secs(30)).expect("it waits");
    assert_eq!(book.trouble().unwrap(), "the disk does not keep up");
    let fifo = path.join("history.jsonl.new");
    let mut reader = File::options().read(true).write(true).open(&fifo).unwrap();
    fs::remove_file(&fifo).unwrap();
    std::thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
    assert!(book.rest(Duration::from_secs(30)));
    // What was left out is written with the next.
    book.note(event("ended", 601));
    drop(book);
    let book = Book::open(&path).unwrap();
    assert_eq!((numbers(&book).len(), book.last()), (601, 601));
}

#[test]
fn a_program_that_cannot_go_on_writing_says_so_and_tries_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let mut book = Book::open(path).unwrap();
    for number in 0..3 {
        book.note(event("ended", number));
    }
    let packed = book.pack();
    drop(book);
    // The program before was ended in the middle of a line, and had lines that are not kept.
    fs::write(path.join(NAME), "{\"sequence\":1,\"ev").unwrap();
    let held = spoiled(path, |path| fs::create_dir(path).unwrap());
    let mut book = Book::unpack(packed, Some(held));
    let end = std::time::Instant::now() + Duration::from_secs(30);
    while book.trouble().is_none() {
        assert!(std::time::Instant::now() < end, "nothing is said");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Book::open(path).is_err(), "the directory is held on");
    fs::remove_dir(path.join("history.jsonl.new")).unwrap();
    book.note(event("ended", 3));
    drop(book);
    assert_eq!(fs::read_to_string(path.join(NAME)).unwrap().lines().count(), 4);
    assert_eq!(numbers(&Book::open(path).unwrap()), [1, 2, 3, 4]);
}

#[test]
fn of_a_long_file_the_newest_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let long = "x".repeat(LONGEST - 100);
    let lines = (1..=2_300).map(|sequence| {
        let mut event = event("ended", 1);
        event.insert("why".to_owned(), long.as_str().into());
        line(&Record { sequence, event })
    });
    let text: Vec<u8> = lines.flatten().collect();
    assert!(text.len() as u64 > MOST_BYTES);
    fs::write(directory.path().join(NAME), text).unwrap();
    let mut book = Book::open(directory.path()).unwrap();
    assert_eq!((numbers(&book).len(), book.last()), (KEPT, 2_300));
    assert_eq!(book.note(event("ended", 1)), 2_301);
}

#[test]
fn of_a_long_event_the_long_members_are_left_out() {
    let mut said = event("ended", 1);
    said.insert("sequence".to_owned(), 7.into());
    assert_eq!(fit(said.clone()), event("ended", 1));
    for long in ["x", "\u{1}", "\""] {
        said.insert("why".to_owned(), long.repeat(LONGEST).into());
        said.insert(long.repeat(LONGEST / 2), 1.into());
        let mut book = Book::default();
        book.note(said.clone());
        let kept = book.after(0).next().unwrap();
        let all = line(kept).len();
        assert!(all <= LONGEST + 64, "{all}");
        assert_eq!(kept.event["change"], "upgrade");
        let parsed: Value = serde_json::from_slice(&line(kept)).unwrap();
        assert_eq!(parsed["sequence"], 1);
        assert!(kept.event["left_out"].as_u64() >= Some(1));
    }
    let many = (0..9_000).map(|number| (number.to_string(), Value::Null)).collect();
    assert!(serde_json::to_string(&fit(many)).unwrap().len() <= LONGEST);
}

#[test]
fn the_file_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = Book::open(directory.path()).unwrap();
    for number in 0..6 * KEPT {
        book.note(event("connected", number));
        assert!(book.kept.as_ref().unwrap().lines <= 4 * KEPT);
    }
    drop(book);
    let lines = fs::read_to_string(directory.path().join(NAME)).unwrap().lines().count();
    assert!(lines <= 4 * KEPT, "{lines}");
    let book = Book::open(directory.path()).unwrap();
    assert_eq!((book.after(0).count(), book.last()), (KEPT, 6 * KEPT as u64));
}
