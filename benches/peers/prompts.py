"""The token ids that every engine is fed; as in `moetrail bench`."""

DECODE_PROMPT = 32


def prompt(length, salt, vocab):
    return [(i * 7919 + salt * 104_729) % vocab for i in range(length)]
