//! What an NBD server sends: the handshake, and replies.
//!
//! What has to hold: a handshake ends with an export that makes sense or with a sentence, however
//! the bytes come; it reads no more than its limits allow. Of replies, each event is about a
//! request that was asked; the data of a read comes once, in order, and no longer than was asked
//! for; a request that was not asked, or was answered before, is a violation. Pieces of any size
//! give the same as all at once.

use crate::input::Input;
use domain_nbd::negotiate::{Refusal, negotiate};
use domain_nbd::wire::{Decoder, Event, Violation};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};

/// Most bytes of a handshake: its replies, each as long as may be.
const LONGEST_HANDSHAKE: usize = 65 * (20 + (64 << 10));

/// Carries a script out.
pub fn one_input(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    if input.one_in(2) {
        handshake(&mut input);
    } else {
        replies(&mut input);
    }
}

/// A server that says what it says, whatever it is asked.
struct Server<'a> {
    says: &'a [u8],
    read: usize,
    /// Bytes that come at a time.
    piece: usize,
}

impl Read for Server<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut rest = &self.says[self.read..];
        let most = into.len().min(self.piece);
        let read = rest.read(&mut into[..most])?;
        self.read += read;
        Ok(read)
    }
}

impl Write for Server<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn handshake(input: &mut Input<'_>) {
    let mut says = Vec::new();
    if input.one_in(16) {
        says.extend_from_slice(input.bytes(18));
    } else {
        says.extend_from_slice(b"NBDMAGICIHAVEOPT");
        says.extend_from_slice(&u16::from(input.pick(&[3u8, 1, 0, 2])).to_be_bytes());
    }
    while !input.is_empty() {
        let data = info(input);
        let magic = if input.one_in(32) { input.u64() } else { 0x0003_e889_0455_65a9 };
        let option = if input.one_in(32) { input.u32() } else { 7 };
        let kind = input.pick(&[3u32, 3, 3, 1, 1, 2, 1 << 31 | 1, 1 << 31 | 6, 0]);
        let len = if input.one_in(16) { input.u32() } else { data.len() as u32 };
        says.extend_from_slice(&magic.to_be_bytes());
        says.extend_from_slice(&option.to_be_bytes());
        says.extend_from_slice(&kind.to_be_bytes());
        says.extend_from_slice(&len.to_be_bytes());
        says.extend_from_slice(&data);
    }
    let outcomes = [1, 7, usize::MAX].map(|piece| {
        let mut server = Server { says: &says, read: 0, piece };
        let outcome = negotiate(&mut server, "export");
        assert!(server.read <= LONGEST_HANDSHAKE, "{} bytes were read", server.read);
        match outcome {
            Ok(export) => {
                assert!(export.minimum.is_power_of_two() && export.minimum <= 64 << 10);
                let unit = export.minimum.max(512);
                assert!(export.maximum >= unit && export.maximum <= 32 << 20, "{export:?}");
                assert!(export.maximum.is_multiple_of(unit), "{export:?}");
                assert!(export.has(1) && i64::try_from(export.size).is_ok(), "{export:?}");
                Ok(export)
            }
            Err(refusal) => {
                let sentence = refusal.to_string();
                assert!(!sentence.is_empty() && sentence.len() < 2000, "{sentence}");
                assert!(!sentence.contains(char::is_control), "{sentence:?}");
                Err(matches!(refusal, Refusal::Io(_)))
            }
        }
    });
    assert!(outcomes[0] == outcomes[1] && outcomes[1] == outcomes[2], "{outcomes:?}");
}

/// What a reply to an option holds.
fn info(input: &mut Input<'_>) -> Vec<u8> {
    let mut data = Vec::new();
    match input.below(4) {
        0 => data.extend_from_slice(input.bytes(40)),
        1 => {
            data.extend_from_slice(&3u16.to_be_bytes());
            for _ in 0..3 {
                let size = input.pick(&[1u32, 512, 4096, 65536, 1 << 25, u32::MAX, 3, 0]);
                data.extend_from_slice(&size.to_be_bytes());
            }
        }
        _ => {
            data.extend_from_slice(&0u16.to_be_bytes());
            let size = input.pick(&[1u64 << 20, 0, 511, u64::MAX, 1 << 62]);
            data.extend_from_slice(&size.to_be_bytes());
            data.extend_from_slice(&(input.u16() | 1).to_be_bytes());
        }
    }
    data
}

/// How much of each request has come, or how it ended.
type Outcome = (BTreeMap<u64, Vec<u8>>, Vec<(u64, u32)>, Option<Violation>);

fn replies(input: &mut Input<'_>) {
    // Requests 0 to 7: the length of what a read asked for; 0 for what is no read.
    let asked: Vec<u64> =
        (0..8).map(|_| u64::from(input.pick(&[0u16, 1, 511, 512, 4096]))).collect();
    let mut says = Vec::new();
    while !input.is_empty() {
        let magic = if input.one_in(32) { input.u32() } else { 0x6744_6698 };
        let error = input.pick(&[0u32, 0, 0, 5, 108, 0xffff_ffff]);
        let cookie = if input.one_in(32) { input.u64() } else { u64::from(input.u8()) % 10 };
        says.extend_from_slice(&magic.to_be_bytes());
        says.extend_from_slice(&error.to_be_bytes());
        says.extend_from_slice(&cookie.to_be_bytes());
        if error == 0 && !input.one_in(32) {
            let len = asked.get(cookie as usize).copied().unwrap_or(0) as usize;
            let seed = input.u8();
            says.extend((0..len).map(|at| seed.wrapping_add(at as u8)));
        }
    }
    let whole = decode(&says, usize::MAX, &asked);
    for piece in [1, 3, 16, 100] {
        assert_eq!(decode(&says, piece, &asked), whole, "in pieces of {piece}");
    }
}

fn decode(says: &[u8], piece: usize, asked: &[u64]) -> Outcome {
    let mut open: Vec<bool> = vec![true; asked.len()];
    let (mut data, mut ended) = (BTreeMap::<u64, Vec<u8>>::new(), Vec::new());
    let mut decoder = Decoder::default();
    for mut bytes in says.chunks(piece.min(says.len().max(1))) {
        loop {
            let expects = |cookie: u64| {
                let at = usize::try_from(cookie).ok()?;
                open.get(at).copied().unwrap_or(false).then(|| asked[at])
            };
            match decoder.next(&mut bytes, expects) {
                Err(violation) => return (data, ended, Some(violation)),
                Ok(None) => break,
                Ok(Some(Event::Data { cookie, at, bytes })) => {
                    let have = data.entry(cookie).or_default();
                    assert_eq!(have.len() as u64, at, "data that is not in order");
                    have.extend_from_slice(bytes);
                    assert!(have.len() as u64 <= asked[cookie as usize], "more than was asked");
                }
                Ok(Some(Event::Ended { cookie, error })) => {
                    let at = cookie as usize;
                    assert!(std::mem::replace(&mut open[at], false), "answered twice");
                    let have = data.get(&cookie).map_or(0, |data| data.len() as u64);
                    assert_eq!(have, if error == 0 { asked[at] } else { 0 }, "half an answer");
                    ended.push((cookie, error));
                }
            }
        }
        assert!(bytes.is_empty(), "bytes that were not looked at");
    }
    (data, ended, None)
}
