//! The handshake: fixed newstyle, `NBD_OPT_GO` with the block sizes asked for, nothing else.
//!
//! Structured replies and extended headers are not asked for: see the decision. All lengths are
//! checked before memory is taken, and a server that sends more than a handshake can be is refused.

use std::io::{self, Read, Write};

const GREETING: u64 = 0x4e42_444d_4147_4943; // NBDMAGIC
const OPTION: u64 = 0x4948_4156_454f_5054; // IHAVEOPT
const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

const OPT_GO: u32 = 7;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;

/// Longest reply to an option: a name and a text, with room to spare.
const LONGEST_REPLY: u32 = 64 << 10;
/// Most replies to one option.
const MOST_REPLIES: usize = 64;
/// Largest request that every server takes, whatever it says.
const LARGEST_REQUEST: u32 = 32 << 20;

/// Flags of an export (NBD protocol, "Transmission flags").
pub mod flags {
    /// All others mean something.
    pub const HAS_FLAGS: u16 = 1;
    /// It cannot be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// It takes FLUSH.
    pub const FLUSH: u16 = 1 << 2;
    /// It takes TRIM.
    pub const TRIM: u16 = 1 << 5;
    /// It takes WRITE_ZEROES.
    pub const WRITE_ZEROES: u16 = 1 << 6;
    /// What was answered on one connection is seen and flushed by the others.
    pub const MULTI_CONN: u16 = 1 << 8;
}

/// What a server says of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// See [`flags`].
    pub flags: u16,
    /// What offsets and lengths must be multiples of.
    pub minimum: u32,
    /// What they are best multiples of; 0 if it is not said.
    pub preferred: u32,
    /// Longest payload.
    pub maximum: u32,
}

impl Export {
    /// Whether it has all of `wanted`.
    #[must_use]
    pub const fn has(&self, wanted: u16) -> bool {
        self.flags & wanted == wanted
    }
}

/// Why there is no export.
#[derive(Debug)]
pub enum Refusal {
    /// The connection failed.
    Io(io::Error),
    /// The server breaks the protocol.
    Protocol(String),
    /// The server says no: the number of the error, and its text.
    Server(u32, String),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                f.write_str("the server has closed the connection in the handshake")
            }
            Self::Io(error) => error.fmt(f),
            Self::Protocol(what) => f.write_str(what),
            Self::Server(code, text) => {
                let what = match code & 0x7fff_ffff {
                    1 => "the server is too old, it does not know NBD_OPT_GO",
                    2 => "the server does not let us in",
                    5 => "the server asks for TLS, which is not supported",
                    6 => "the server has no export of this name (`nbdinfo --list` shows them)",
                    7 => "the server is going down",
                    8 => "the server asks for blocks that it does not tell",
                    _ => "the server refuses",
                };
                f.write_str(what)?;
                // It is the server's, and goes to a log.
                let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
                if text.is_empty() { Ok(()) } else { write!(f, ": {text}") }
            }
        }
    }
}

/// Agrees with a server on `export`.
///
/// # Errors
/// Why that is not possible. The connection is of no use then.
pub fn negotiate(stream: &mut (impl Read + Write), export: &str) -> Result<Export, Refusal> {
    let protocol = |what: &str| Err(Refusal::Protocol(what.to_owned()));
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let number = |at: usize| u64::from_be_bytes(greeting[at..at + 8].try_into().expect("eight"));
    if number(0) != GREETING {
        return protocol("this is no NBD server");
    }
    if number(8) == OLDSTYLE {
        return protocol("the server speaks oldstyle NBD; serve the image with a newer one");
    }
    if number(8) != OPTION {
        return protocol("the server greets as no NBD server does");
    }
    let offered = u16::from_be_bytes([greeting[16], greeting[17]]);
    if offered & 1 == 0 {
        return protocol("the server does not speak fixed newstyle; use a newer one");
    }
    let name = export.as_bytes();
    let mut ask = Vec::with_capacity(64 + name.len());
    ask.extend_from_slice(&u32::from(offered & 3).to_be_bytes());
    ask.extend_from_slice(&OPTION.to_be_bytes());
    ask.extend_from_slice(&OPT_GO.to_be_bytes());
    ask.extend_from_slice(&(4 + name.len() as u32 + 2 + 2).to_be_bytes());
    ask.extend_from_slice(&(name.len() as u32).to_be_bytes());
    ask.extend_from_slice(name);
    ask.extend_from_slice(&1u16.to_be_bytes());
    ask.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    stream.write_all(&ask)?;
    stream.flush()?;
    let (mut found, mut blocks) = (None, None);
    for _ in 0..MOST_REPLIES {
        let (kind, data) = option_reply(stream)?;
        match kind {
            REP_ACK => {
                let Some((size, flags)) = found else {
                    return protocol("the server agrees without saying what the export is");
                };
                return checked(size, flags, blocks);
            }
            REP_INFO if data.len() >= 2 => {
                let (kind, data) = data.split_at(2);
                match (u16::from_be_bytes([kind[0], kind[1]]), data.len()) {
                    (INFO_EXPORT, 10) => found = Some((be64(data), be16(&data[8..]))),
                    (INFO_BLOCK_SIZE, 12) => {
                        blocks = Some((be32(data), be32(&data[4..]), be32(&data[8..])));
                    }
                    (INFO_EXPORT | INFO_BLOCK_SIZE, _) => {
                        return protocol("the server describes the export in another length");
                    }
                    // Not asked for, and allowed.
                    _ => {}
                }
            }
            REP_INFO => return protocol("the server describes the export in too few bytes"),
            error if error & 1 << 31 != 0 => {
                return Err(Refusal::Server(error, String::from_utf8_lossy(&data).into_owned()));
            }
            _ => return protocol("the server answers with what is no answer to NBD_OPT_GO"),
        }
    }
    protocol("the server does not come to an end with NBD_OPT_GO")
}

/// One reply to our option: its kind and its data.
fn option_reply(stream: &mut impl Read) -> Result<(u32, Vec<u8>), Refusal> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    if be64(&header) != OPTION_REPLY || be32(&header[8..]) != OPT_GO {
        return Err(Refusal::Protocol("the server answers what was not asked".to_owned()));
    }
    let (kind, len) = (be32(&header[12..]), be32(&header[16..]));
    if len > LONGEST_REPLY {
        return Err(Refusal::Protocol(format!("the server answers with {len} bytes")));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

fn checked(size: u64, flags: u16, blocks: Option<(u32, u32, u32)>) -> Result<Export, Refusal> {
    let (minimum, preferred, maximum) = blocks.unwrap_or((1, 0, LARGEST_REQUEST));
    if flags & flags::HAS_FLAGS == 0 {
        return Err(Refusal::Protocol("the server says nothing of what it can do".to_owned()));
    }
    let is_sound = minimum.is_power_of_two()
        && minimum <= 64 << 10
        && (preferred == 0 || preferred.is_power_of_two() && preferred >= minimum)
        && maximum >= minimum.max(512);
    if !is_sound {
        return Err(Refusal::Protocol(format!(
            "the server's block sizes ({minimum}, {preferred}, {maximum}) make no sense"
        )));
    }
    if i64::try_from(size).is_err() {
        return Err(Refusal::Protocol(format!("the server has an export of {size} bytes")));
    }
    // Whatever is told (one tells 4 GiB and refuses 64 MiB), and whole blocks.
    let maximum = maximum.min(LARGEST_REQUEST) / minimum.max(512) * minimum.max(512);
    Ok(Export { size, flags, minimum, preferred, maximum })
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from(be32(bytes)) << 32 | u64::from(be32(&bytes[4..]))
}
