//! The order in which unreferenced blocks are reused: a doubly linked list over block ids.

const NONE: u32 = u32::MAX;

/// Unreferenced blocks, least recently used first. Every operation is O(1).
#[derive(Debug)]
pub(crate) struct FreeList {
    /// `(previous, next)` by block id; meaningful only for members.
    links: Vec<(u32, u32)>,
    head: u32,
    tail: u32,
    len: usize,
}

impl FreeList {
    /// All of `0..num_blocks`, in that order.
    pub(crate) fn full(num_blocks: u32) -> Self {
        let mut list = Self { links: vec![(NONE, NONE); num_blocks as usize], head: NONE, tail: NONE, len: 0 };
        for block in 0..num_blocks {
            list.push_back(block);
        }
        list
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn front(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    pub(crate) fn pop_front(&mut self) -> Option<u32> {
        let block = self.front()?;
        self.remove(block);
        Some(block)
    }

    /// To be reused last.
    pub(crate) fn push_back(&mut self, block: u32) {
        self.links[block as usize] = (self.tail, NONE);
        match self.tail {
            NONE => self.head = block,
            tail => self.links[tail as usize].1 = block,
        }
        self.tail = block;
        self.len += 1;
    }

    /// To be reused first.
    pub(crate) fn push_front(&mut self, block: u32) {
        self.links[block as usize] = (NONE, self.head);
        match self.head {
            NONE => self.tail = block,
            head => self.links[head as usize].0 = block,
        }
        self.head = block;
        self.len += 1;
    }

    /// Takes a member out.
    pub(crate) fn remove(&mut self, block: u32) {
        let (previous, next) = self.links[block as usize];
        match previous {
            NONE => self.head = next,
            previous => self.links[previous as usize].1 = next,
        }
        match next {
            NONE => self.tail = previous,
            next => self.links[next as usize].0 = previous,
        }
        self.len -= 1;
    }
}
