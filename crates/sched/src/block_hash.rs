//! The names of cached blocks: a chain over everything that decides a block's KV.

use xxhash_rust::xxh3::Xxh3;

/// The 128-bit chain hash of a full block: its tokens, all tokens before it, and the scope of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(u128);

/// What separates one prefix cache from another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheScope<'a> {
    /// The client's `cache_salt`.
    pub salt: Option<&'a str>,
    /// Bumped whenever all KV becomes stale (weight update, reset).
    pub epoch: u64,
}

impl BlockHash {
    /// The parent of a sequence's first block.
    pub fn root(scope: &CacheScope<'_>) -> Self {
        let mut hasher = Xxh3::new();
        hasher.update(&scope.epoch.to_le_bytes());
        // An absent salt and an empty one must differ.
        hasher.update(&[u8::from(scope.salt.is_some())]);
        hasher.update(scope.salt.unwrap_or_default().as_bytes());
        Self(hasher.digest128())
    }

    /// The hash of the block that holds `tokens` and follows this one; `replay` is a digest of its routing if that was
    /// given and not chosen, so that replayed and free blocks never match each other.
    pub fn child(self, tokens: &[u32], replay: Option<u128>) -> Self {
        let mut hasher = Xxh3::new();
        hasher.update(&self.0.to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        // Blocks have one size, so a digest cannot be taken for tokens.
        if let Some(digest) = replay {
            hasher.update(&digest.to_le_bytes());
        }
        Self(hasher.digest128())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scope_and_history_separate_equal_tokens() {
        let scope = |salt: Option<&'static str>, epoch| CacheScope { salt, epoch };
        let roots =
            [scope(None, 0), scope(Some(""), 0), scope(Some("a"), 0), scope(None, 1)].map(|s| BlockHash::root(&s));
        for (i, a) in roots.iter().enumerate() {
            for b in &roots[i + 1..] {
                assert_ne!(a.child(&[1, 2], None), b.child(&[1, 2], None));
            }
        }
        assert_ne!(roots[0].child(&[1], None).child(&[2], None), roots[0].child(&[2], None).child(&[1], None));
        assert_ne!(roots[0].child(&[1], None), roots[0].child(&[1], Some(0)));
        assert_ne!(roots[0].child(&[1], Some(1)), roots[0].child(&[1], Some(0)));
    }
}
