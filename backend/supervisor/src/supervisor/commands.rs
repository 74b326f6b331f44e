//! The control front: what its clients want of the supervisor.

use super::Supervisor;
use crate::front::{Front, Wish};
use channel::ToServer;
use control::{Limits, SocketFile};
use std::os::fd::AsFd;

impl Supervisor {
    pub(super) fn settle_front(&mut self) {
        if let Some(front) = &mut self.front {
            front.tick();
        }
        // What is done for one wish may be the reason of the next.
        loop {
            let wishes = self.front.as_mut().map(Front::wishes).unwrap_or_default();
            if wishes.is_empty() {
                return;
            }
            for wish in wishes {
                self.grant(wish);
            }
        }
    }

    fn grant(&mut self, wish: Wish) {
        match wish {
            Wish::Client(stream) => {
                let Some(server) = &self.server else { return };
                // A server that hears nothing must not hold up the rest.
                match server.channel.try_send(&ToServer::Client, &[stream.as_fd()]) {
                    Ok(true) => {}
                    Ok(false) => log::warn!("the server takes no more clients"),
                    Err(error) => log::debug!("the server is given no client: {error}"),
                }
            }
            Wish::UpgradeDaemon(ticket, request) => self.upgrade_daemon(ticket, request),
            Wish::Metrics(ticket) => self.tell_metrics(ticket),
            Wish::Shutdown => self.end("shutdown"),
            Wish::Revive => self.revive(),
        }
    }

    pub(super) fn make_front(&mut self) {
        if self.front.is_some() {
            return;
        }
        let socket = SocketFile::listen(&self.options.control_path, 0o600);
        let front = socket
            .map_err(|error| error.to_string())
            .and_then(|socket| Front::new(socket, Limits::default()).map_err(|e| e.to_string()));
        match front {
            Ok(front) => {
                log::info!("commands at {}", self.options.control_path.display());
                let book = std::mem::take(&mut self.options.book);
                self.front = Some(front.with_book(book));
            }
            Err(error) => {
                if let Some(server) = &self.server {
                    server.kill();
                }
                self.over = Some(Err(error));
            }
        }
    }
}
