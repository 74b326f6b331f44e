//! In-flight regions: made for the frontend, and taken from it.

use super::{Effect, Relay};
use crate::fields::inflight;
use crate::region::Region;
use crate::wire::Message;

impl Relay {
    pub(super) fn make_region(&mut self, message: &Message, effects: &mut Vec<Effect>) {
        let Some(wanted) = inflight(message) else {
            effects.push(Effect::Close("it asks for no in-flight region".to_owned()));
            return;
        };
        match Region::new(wanted.queues, wanted.queue_size) {
            Ok(region) => {
                let mut body = [region.place.len.to_le_bytes(), [0; 8]].concat();
                body.extend(&message.body[16..]);
                let answer = Message::reply(message.request, body, vec![region.memfd]);
                effects.push(Effect::Frontend(answer));
            }
            Err(error) => effects.push(Effect::Close(format!("no in-flight region: {error}"))),
        }
    }

    pub(super) fn take_region(&mut self, message: &Message, effects: &mut Vec<Effect>) {
        let leaves = self.region.place.leaves;
        let region = match (inflight(message), message.files.first()) {
            (Some(place), Some(memfd)) => {
                Region::given(place, memfd.clone()).map(|region| region.leaving(leaves))
            }
            _ => Err("there is none in the message".to_owned()),
        };
        match region {
            Ok(region) if region == self.region => self.acknowledge(message, true, effects),
            Ok(region) => {
                self.is_given = true;
                self.use_region(region, effects);
                self.acknowledge(message, true, effects);
            }
            Err(why) => {
                self.acknowledge(message, false, effects);
                effects.push(Effect::Close(format!("its in-flight region is refused: {why}")));
            }
        }
    }

    pub(super) fn use_region(&mut self, region: Region, effects: &mut Vec<Effect>) {
        self.region = region.clone();
        if !self.is_waiting() {
            self.waits_for_region = true;
            effects.push(Effect::Inflight(region));
        }
    }

    /// The driver begins anew: what is marked was another's, and is never answered. A region of the
    /// frontend's is its own to replace.
    pub(super) fn forget_marks(&mut self, effects: &mut Vec<Effect>) {
        if self.is_given || self.region.oldest().is_empty() {
            return;
        }
        match Region::own(self.region.place.queues) {
            Ok(region) => {
                self.use_region(region.leaving(self.region.place.leaves), effects);
            }
            Err(error) => effects.push(Effect::Close(format!("no in-flight region: {error}"))),
        }
    }
}
