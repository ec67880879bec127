//! Replies that wait to be sent, one after the other.

/// What is kept of the room between requests.
const KEPT: usize = (2 << 20) + (64 << 10);

/// Bytes that are made where they will be sent from. The room is cleared once, when it grows, and not for each
/// reply.
#[derive(Debug, Default)]
pub(super) struct Replies {
    room: Vec<u8>,
    len: usize,
}

impl Replies {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.room[..self.len]
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// So many bytes more, which hold anything.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let (start, end) = (self.len, self.len + len);
        if end > self.room.len() {
            self.room.resize(end, 0);
        }
        self.len = end;
        &mut self.room[start..end]
    }

    /// Takes back what came after the first `len` bytes.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = len;
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
        if self.room.len() > KEPT {
            self.room = Vec::new();
        }
    }
}
