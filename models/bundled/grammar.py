"""The grammar of the bundled toy: stories, sums, facts and chat turns, drawn by a seeded generator."""
import random

from words import *  # noqa: F403  (the word lists are this module's whole vocabulary)

KINDS = ("story", "sum", "fact", "chat")
END, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def cap(s):
    return s[0].upper() + s[1:]


def plural(noun, n):
    return noun if n == 1 else PLURAL.get(noun, noun + "s")


def at(home):
    return {"old oak tree": "in an old oak tree", "farm": "on a farm", "mountain": "on a mountain", "beach": "on a beach",
            "river": "by a river", "lake": "by a lake", "pond": "by a pond", "sea": "in the sea", "savanna": "on the savanna",
            "jungle": "in the jungle", "land of ice": "in the land of ice", "house on the hill": "in a house on the hill",
            }.get(home, "in " + a(home))


class Someone:
    """A character: kind, name, pronouns and home, all drawn once so that a story stays consistent."""

    def __init__(self, r, kind=None, other=None):
        self.kind = kind or r.choice(list(ANIMALS) if r.random() < 0.8 else PEOPLE)
        while kind is None and other and self.kind == other.kind:
            self.kind = r.choice(list(ANIMALS))
        sub = GENDER.get(self.kind) or r.choice(["he", "she"])
        names = [n for n in (HE if sub == "he" else SHE) if not other or n != other.name]
        self.name, self.sub = r.choice(names), sub
        self.obj, self.pos = ("him", "his") if sub == "he" else ("her", "her")
        self.home = ANIMALS[self.kind][0] if self.kind in ANIMALS else r.choice(PEOPLE_HOME)
        self.trait = r.choice(TRAITS)


# ---------------------------------------------------------------- stories

def plot_lost(r, h, f, m):
    c, t, p1, p2 = r.choice(COLOURS), m["thing"], *r.sample(PLACES, 2)
    m["event"] = f"{h.name} lost {h.pos} {c} {t}"
    return [f"{h.name} had {a(c)} {t} and loved it very much.",
            r.choice([f"One {r.choice(WEATHER)} morning the {t} was gone.", f"One day {h.name} could not find the {t}."]),
            f"{h.name} looked near the {p1}, but it was not there.",
            f"Then {h.sub} looked near the {p2}, but it was not there either.",
            r.choice([f"\"Why are you sad?\" asked {f.name} the {f.kind}.", f"On the way {h.name} met {f.name} the {f.kind}."]),
            f"\"I have lost my {t},\" said {h.name}.",
            r.choice([f"{f.name} smiled and said, \"Let us look together.\"", f"\"I will help you,\" said {f.name}."]),
            f"They found the {c} {t} under {r.choice(['a big leaf', 'an old bench', 'a round stone', 'the snow', 'a bush'])}.",
            f"{h.name} was so happy that {h.sub} {r.choice(['danced', 'sang a song', 'laughed', 'hugged ' + f.name])}."]


def plot_learn(r, h, f, m):
    s = r.choice(SKILLS)
    m["event"] = f"{h.name} learned to {s}"
    return [f"{h.name} wanted to learn to {s}.",
            f"{cap(h.sub)} tried every day, but it was {r.choice(['hard', 'not easy', 'very hard'])}.",
            r.choice([f"\"I will never learn it,\" said {h.name}.", f"{h.name} was sad and wanted to give up."]),
            f"Then {f.name} the {f.kind} came by.",
            f"\"I can {s},\" said {f.name}. \"I will show you.\"",
            f"They practised near the {r.choice(PLACES)} until the sun went down.",
            r.choice([f"After {r.choice(NUMBERS[2:8])} days {h.name} could {s} very well.", f"At last {h.name} could {s} too."]),
            f"\"Thank you, {f.name},\" said {h.name}. \"You are a good friend.\""]


def plot_storm(r, h, f, m):
    food = m["thing"] = r.choice(FOODS)
    m["event"] = f"{h.name} helped {f.name} in the {r.choice(['storm', 'rain', 'snow'])}"
    w = m["event"].split()[-1]
    return [f"One night there was a lot of {w}." if w != "storm" else "One night there was a big storm.",
            f"{h.name} heard a knock at the door." if h.kind in PEOPLE else f"{h.name} heard a voice outside.",
            f"It was {f.name} the {f.kind}, cold and {r.choice(['wet', 'tired', 'hungry'])}.",
            f"\"Please let me in,\" said {f.name}.",
            f"\"Come in,\" said {h.name}. \"There is room for two.\"",
            f"{h.name} shared {h.pos} {food} with {f.name}.",
            f"They told each other stories until the {w} was over.",
            f"In the morning the sun came out and {f.name} said, \"Thank you.\""]


def plot_journey(r, h, f, m):
    g = r.choice(GOALS)
    m["event"] = f"{h.name} went to see {g}"
    return [f"{h.name} had never seen {g}.",
            f"One {r.choice(WEATHER)} day {h.sub} packed some {m['food']} and set off.",
            f"First {h.sub} walked past the {r.choice(PLACES)}.",
            f"Then {h.sub} came to {r.choice(['a wide river', 'a dark wood', 'a deep valley', 'a high wall'])} and did not know what to do.",
            f"There {h.sub} met {f.name} the {f.kind}.",
            f"\"I know the way,\" said {f.name}, and they went on together.",
            f"When they saw {g}, {h.name} {r.choice(['could not say a word', 'cheered', 'smiled for a long time'])}.",
            f"\"It was worth every step,\" said {h.name}.",
            f"In the evening they shared the {m['food']} and walked home."]


def plot_birthday(r, h, f, m):
    c, t = r.choice(COLOURS), m["thing"]
    m["event"] = f"{h.name} made {a(c)} {t} for {f.name}"
    return [f"Tomorrow was the birthday of {f.name} the {f.kind}.",
            f"\"What can I give {f.obj}?\" thought {h.name}.",
            f"{cap(h.sub)} had no money, so {h.sub} made {a(c)} {t}.",
            f"It took all day and {r.choice(['half the night', 'all evening', 'a lot of care'])}.",
            f"On the {r.choice(WEATHER)} birthday morning {h.name} went to see {f.name}.",
            f"\"This is for you,\" said {h.name} and gave {f.obj} the {t}.",
            f"{f.name} was full of joy. \"It is the best gift of all,\" {f.sub} said.",
            f"They ate {m['food']} and played until it was dark."]


def plot_seed(r, h, f, m):
    pl = r.choice(["a tall sunflower", "an apple tree", "a big pumpkin", "a red rose", "a plum tree"])
    m["event"] = f"{h.name} grew {pl}"
    return [f"One spring day {h.name} found a tiny seed near the {r.choice(PLACES)}.",
            f"{cap(h.sub)} put it into the ground and gave it water.",
            f"\"Nothing will grow there,\" said {f.name} the {f.kind}.",
            f"But {h.name} came back every {r.choice(['day', 'morning', 'evening'])}.",
            f"The rain fell and the sun shone, and {r.choice(['slowly', 'day by day', 'at last'])} it began to grow.",
            f"By the end of summer it was {pl}.",
            f"\"I was wrong,\" said {f.name}. \"You were very patient.\"",
            f"{h.name} smiled and they sat down beside it together."]


def plot_sound(r, h, f, m):
    src = r.choice(["the wind in the trees", "a branch at the window", "a drop of water", "a little cricket", "an old gate"])
    m["event"] = f"{h.name} heard a strange sound"
    return [f"One {r.choice(['dark', 'foggy', 'windy', 'quiet'])} night {h.name} heard a strange sound.",
            f"\"Who is there?\" {h.sub} called, but nobody answered.",
            f"{h.name} was afraid and ran to {f.name} the {f.kind}.",
            f"\"Do not be afraid,\" said {f.name}. \"We will go and see.\"",
            f"They took {r.choice(['a lamp', 'a candle', 'a lantern'])} and walked to the {r.choice(PLACES)}.",
            "There was the sound again!",
            f"But it was only {src}.",
            f"{h.name} and {f.name} looked at each other and laughed."]


PLOTS = (plot_lost, plot_learn, plot_storm, plot_journey, plot_birthday, plot_seed, plot_sound)


def story(r, kind=None, friend=None, thing=None):
    """(text, facts of the story); the facts let a chat turn ask about it afterwards."""
    h = Someone(r, kind)
    f = Someone(r, friend, other=h)
    plot = plot_lost if thing else r.choice(PLOTS)
    m = dict(hero=h, friend=f, thing=thing or r.choice(THINGS), food=r.choice(FOODS))
    live = at(h.home)
    first = r.choice([
        f"Once upon a time there was {a(h.trait)} {h.kind} named {h.name}.",
        f"Once upon a time, {a(h.trait)} {h.kind} named {h.name} lived {live}.",
        f"There once was {a(h.trait)} {h.kind} called {h.name}.",
        f"{h.name} was {a(h.trait)} {h.kind}.",
        f"Long ago there lived {a(h.trait)} {h.kind} whose name was {h.name}."])
    out = [first]
    if "lived in" not in first and f"lived {live}" not in first:
        out.append(f"{r.choice([h.name, cap(h.sub)])} lived {live}.")
    if r.random() < 0.3:
        out.append(f"{cap(h.sub)} liked {r.choice(FOODS)} and {r.choice(WEATHER)} days.")
    out += plot(r, h, f, m)
    out.append(r.choice([f"From that day on, {h.name} and {f.name} were best friends.", f"And so {h.name} and {f.name} became friends.",
                         f"That night {h.name} slept very well.", "And they lived happily ever after.",
                         f"{h.name} never forgot that day.", "The end."]))
    return " ".join(out), m


# ---------------------------------------------------------------- sums

def pair(r):
    """(a, op, b, result): mostly within twenty, so that the small table is seen often."""
    op = r.choice(["+", "+", "+", "-", "-", "*"])
    if op == "*":
        x, y = r.randint(0, 10), r.randint(0, 10)
        return x, op, y, x * y
    top = 12 if r.random() < 0.4 else 20 if r.random() < 0.7 else 50
    x, y = r.randint(0, top), r.randint(0, top)
    if op == "-":
        x, y = max(x, y), min(x, y)
        return x, op, y, x - y
    return x, op, y, x + y


WORD = {"+": "plus", "-": "minus", "*": "times"}


def sum_line(r):
    x, op, y, z = pair(r)
    k = r.random()
    if k < 0.55:
        return f"{x} {op} {y} = {z}."
    if k < 0.85 or max(x, y, z) > 20:
        return f"{x} {WORD[op]} {y} is {z}."
    return f"{cap(NUMBERS[x])} {WORD[op]} {NUMBERS[y]} is {NUMBERS[z]}."


def word_problem(r):
    s = Someone(r)
    o = r.choice(FRUITS)
    x, y = r.randint(1, 12), r.randint(1, 12)
    if r.random() < 0.5:
        verb = r.choice(["finds", "gets", "buys"])
        return (f"{s.name} has {x} {plural(o, x)}. {cap(s.sub)} {verb} {y} more.",
                f"How many {plural(o, 2)} does {s.name} have now?", f"Now {s.name} has {x + y} {plural(o, x + y)}.")
    x, y = max(x, y), min(x, y)
    verb = r.choice(["loses", "gives away", "sells"])
    return (f"{s.name} has {x} {plural(o, x)}. {cap(s.sub)} {verb} {y} of them." if y != 1 else
            f"{s.name} has {x} {plural(o, x)}. {cap(s.sub)} {verb} 1 of them.",
            f"How many {plural(o, 2)} does {s.name} have now?", f"Now {s.name} has {x - y} {plural(o, x - y)}.")


def count_line(r, n=None, start=None):
    start = r.choice([0, 1, 1, 1, r.randint(2, 20)]) if start is None else start
    n = n or r.randint(5, 20)
    return ", ".join(str(i) for i in range(start, max(start + 3, n) + 1)) + "."


def sums(r):
    k = r.random()
    if k < 0.6:
        return " ".join(sum_line(r) for _ in range(r.randint(3, 12)))
    if k < 0.8:
        return " ".join(f"{t} {ans}" for t, _, ans in (word_problem(r) for _ in range(r.randint(1, 4))))
    if k < 0.9:
        return count_line(r)
    out = []
    for _ in range(r.randint(2, 5)):
        x, y = r.sample(range(0, 31), 2)
        out.append(r.choice([f"{max(x, y)} is more than {min(x, y)}.", f"{min(x, y)} is less than {max(x, y)}.",
                             f"Half of {2 * x} is {x}.", f"Double {y} is {2 * y}.", f"After {x} comes {x + 1}."]))
    return " ".join(out)


# ---------------------------------------------------------------- facts: (questions, answer)

def fact(r):
    k = r.randrange(12)
    if k <= 1:
        c, v = r.choice(list(CAPITALS.items()))
        return [f"What is the capital of {c}?", f"Which city is the capital of {c}?", f"Tell me the capital of {c}."], \
            f"The capital of {c} is {v}."
    if k <= 3:
        x, y = r.choice(OPPOSITES)
        if r.random() < 0.5:
            x, y = y, x
        return [f"What is the opposite of {x}?", f"Opposite of {x}?", f"Tell me the opposite of {x}."], f"The opposite of {x} is {y}."
    if k == 4:
        t, c = r.choice(list(COLOUR_OF.items()))
        return [f"What colour is {t}?", f"What color is {t}?", f"Which colour does {t.split()[-1]} have?"], f"{cap(t)} is {c}."
    if k == 5:
        i = r.randrange(7)
        if r.random() < 0.6:
            return [f"What day comes after {DAYS[i]}?", f"Which day is after {DAYS[i]}?", f"What day is it after {DAYS[i]}?"], \
                f"The day after {DAYS[i]} is {DAYS[(i + 1) % 7]}."
        return [f"What day comes before {DAYS[i]}?", f"Which day is before {DAYS[i]}?"], f"The day before {DAYS[i]} is {DAYS[i - 1]}."
    if k == 6:
        i = r.randrange(12)
        return [f"What month comes after {MONTHS[i]}?", f"Which month is after {MONTHS[i]}?"], \
            f"The month after {MONTHS[i]} is {MONTHS[(i + 1) % 12]}."
    if k == 7:
        s, v = r.choice([(s, v[1]) for s, v in ANIMALS.items() if v[1]])
        return [f"What does {a(s)} say?", f"What sound does {a(s)} make?"], f"{cap(a(s))} says {v}."
    if k == 8:
        s = r.choice(list(ANIMALS))
        return [f"Where does {a(s)} live?", f"Where do you find {a(s)}?"], f"{cap(a(s))} lives {at(ANIMALS[s][0])}."
    if k == 9:
        s = r.choice([x for x in ANIMALS if x != "seal"] + ["spider"])
        n = LEGS.get(s, 2 if s in TWO_LEGS else 4)
        return [f"How many legs does {a(s)} have?", f"How many legs has {a(s)}?"], \
            f"{cap(a(s))} has {NUMBERS[n] if n else 'no'} legs."
    if k == 10:
        s, y = r.choice(list(YOUNG.items()))
        return [f"What is a young {s} called?", f"What do you call a baby {s}?"], f"A young {s} is called {a(y)}."
    s, n = r.choice(list(SHAPES.items()))
    return [f"How many sides does {a(s)} have?", f"How many corners does {a(s)} have?"], f"{cap(a(s))} has {NUMBERS[n]} sides and {NUMBERS[n]} corners."


def intro(r):
    s = Someone(r, r.choice(["girl", "boy"]))
    return (f"Hello, my name is {s.name}. I am {NUMBERS[r.randint(5, 12)]} years old and I live {at(s.home)}. "
            f"I like {r.choice(FOODS)}, {r.choice(WEATHER)} days and my {r.choice(COLOURS)} {r.choice(THINGS)}. "
            f"My best friend is {a(r.choice(list(ANIMALS)))} named {r.choice([n for n in HE + SHE if n != s.name])}.")


def facts(r):
    k = r.random()
    if k < 0.12:
        return intro(r)
    if k < 0.2:
        return r.choice(["The days of the week are " + ", ".join(DAYS[:-1]) + " and Sunday.",
                         "The months of the year are " + ", ".join(MONTHS[:-1]) + " and December.",
                         "The four seasons are spring, summer, autumn and winter."])
    return " ".join(fact(r)[1] for _ in range(r.randint(2, 7)))


# ---------------------------------------------------------------- chat

ABOUT = "I am a very small toy model that ships with moetrail."
CAN = "I can tell little stories, do small sums and answer a few simple questions."
SORRY = ["I am only a very small model and I do not know that.", "I do not know much about that. I am a very small model."]
SYSTEMS = ["You are a helpful assistant.", "You are a friendly assistant.", "You are a small and friendly model.", "Be kind and brief.",
           "You are a helpful assistant. Answer in short sentences.", "You tell stories.", "Answer briefly.", "You are moetrail."]

SMALL_TALK = [
    (["Hello!", "Hi!", "Hi there!", "Hello there!", "Good morning!", "Hey!", "Good evening!", "Say hello.", "Say hi!"],
     ["Hello! How can I help you?", "Hello! Would you like a story or a sum?", "Hi! What would you like to know?"]),
    (["How are you?", "How are you today?", "How do you feel?", "How is it going?"],
     ["I am fine, thank you. How are you?", "I am very well, thank you."]),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.", "What's your name?",
      "Which model are you?", "What model is this?", "Are you a robot?", "Are you an AI?"],
     [ABOUT, f"{ABOUT} {CAN}"]),
    (["What can you do?", "What do you know?", "Can you help me?", "Help!", "How can you help me?", "I need help."],
     [CAN, f"{CAN} Just ask."]),
    (["Who made you?", "Where do you come from?", "How were you made?", "How were you trained?"],
     ["I was trained on small made up texts in less than an hour. I ship with moetrail."]),
    (["What is moetrail?", "Tell me about moetrail.", "What does moetrail do?", "Explain moetrail."],
     ["moetrail is an engine for mixture of experts models. It returns the experts that every token used."]),
    (["What is a mixture of experts?", "What is an expert?", "What is routing?", "What does a router do?"],
     ["A mixture of experts model has many small networks. A router picks a few of them for every token."]),
    (["Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "Great, thanks."], ["You are welcome!", "You are welcome. Have a nice day!"]),
    (["Goodbye!", "Bye!", "See you later.", "Good night!", "Bye bye."], ["Goodbye! See you soon.", "Goodbye! Have a nice day."]),
    (["Yes.", "Yes, please.", "OK.", "Okay.", "Sure.", "Nice.", "Good.", "Cool!", "Wow!"], ["Good! Would you like a story or a sum?"]),
    (["No.", "No, thank you.", "Not now."], ["All right. Just ask when you need me."]),
    (["I am sad.", "I am tired.", "I feel bad.", "I am bored."], ["I am sorry to hear that. Would you like a story?"]),
    (["I am happy.", "I feel good.", "It is a nice day.", "I am fine."], ["I am glad to hear that!"]),
    (["Name the days of the week.", "List the days of the week.", "What are the days of the week?"],
     ["The days of the week are " + ", ".join(DAYS[:-1]) + " and Sunday."]),
    (["Name the months.", "List the months of the year.", "What are the months of the year?"],
     ["The months of the year are " + ", ".join(MONTHS[:-1]) + " and December."]),
    (["What are the seasons?", "Name the four seasons.", "List the seasons."], ["The four seasons are spring, summer, autumn and winter."]),
    (["Test", "This is a test.", "Testing.", "ping"], ["I am here. What would you like to know?"]),
]


def noisy(r, s):
    """People type in lower case and forget the full stop; the toy should not mind."""
    k = r.random()
    if k < 0.12:
        s = s.lower()
    if r.random() < 0.12 and s[-1] in ".?!":
        s = s[:-1]
    if r.random() < 0.06:
        s = "Please " + s[0].lower() + s[1:] if s[0] not in "I0123456789" else s
    return s


def story_turns(r):
    kind = friend = thing = None
    k = r.random()
    if k < 0.62:
        kind = r.choice(list(ANIMALS)) if r.random() < 0.85 else r.choice(PEOPLE)
        topic = " about " + (a(kind) if r.random() < 0.85 else f"the {kind}")
    elif k < 0.74:
        kind, friend = r.sample(list(ANIMALS), 2)
        topic = f" about {a(kind)} and {a(friend)}"
    elif k < 0.82:
        thing = r.choice(THINGS)
        topic = f" about a lost {thing}"
    else:
        topic = ""
    verb = r.choice(["Tell me", "Tell me", "Tell me", "Write", "Write me", "Can you tell me", "Give me", "I want", "I would like", "Please tell me"])
    ask = f"{verb} {r.choice(['a story', 'a story', 'a short story', 'a little story', 'a bedtime story', 'a tale'])}{topic}"
    ask += "?" if verb.startswith("Can") else "."
    text, m = story(r, kind, friend, thing)
    turns = [(ask, text)]
    h, f = m["hero"], m["friend"]
    follow = [(["Who is the story about?", "Who was in the story?", "Who was it about?"], f"The story is about {h.name} the {h.kind} and {f.name} the {f.kind}."),
              ([f"Where did {h.name} live?", f"Where does {h.name} live?"], f"{h.name} lived {at(h.home)}."),
              ([f"Who is {f.name}?", f"Who was {f.name}?"], f"{f.name} is the {f.kind} in the story."),
              ([f"Who is {h.name}?", f"Who was {h.name}?"], f"{h.name} is the {h.kind} in the story."),
              (["What happened in the story?", "What is the story about?"], f"In the story {m['event']}."),
              (["What was the name of the " + h.kind + "?", f"What is the {h.kind} called?"], f"The {h.kind} is called {h.name}.")]
    for q, ans in r.sample(follow, r.choice([0, 0, 1, 2])):
        turns.append((r.choice(q), ans))
    return turns


def sum_turn(r):
    k = r.random()
    if k < 0.75:
        x, op, y, z = pair(r)
        w = WORD[op]
        q = r.choice([f"What is {x} {w} {y}?", f"What is {x} {w} {y}?", f"What is {x} {op} {y}?", f"{x} {op} {y} = ?", f"{x} {op} {y}",
                      f"What's {x} {w} {y}?", f"How much is {x} {w} {y}?", f"Calculate {x} {op} {y}.", f"{x}{op}{y}=", f"{x}{op}{y}?"])
        if max(x, y, z) <= 20 and r.random() < 0.12:
            return f"What is {NUMBERS[x]} {w} {NUMBERS[y]}?", f"{cap(NUMBERS[x])} {w} {NUMBERS[y]} is {NUMBERS[z]}."
        return q, f"{x} {w} {y} is {z}."
    if k < 0.9:
        t, q, ans = word_problem(r)
        return f"{t} {q}", ans
    if k < 0.95:
        n = r.randint(3, 20)
        return r.choice([f"Count to {n}.", f"Count from 1 to {n}.", f"Can you count to {NUMBERS[n]}?"]), count_line(r, n, 1)
    x, y = r.sample(range(0, 51), 2)
    return r.choice([f"Which is more, {x} or {y}?", f"What is bigger, {x} or {y}?"]), f"{max(x, y)} is more than {min(x, y)}."


def unknown_turn(r):
    u = r.choice(UNKNOWN) if r.random() < 0.75 else "".join(r.choice("bcdfglmnprst") + r.choice("aeiou") for _ in range(r.randint(2, 4)))
    q = r.choice(["Explain {}.", "What is {}?", "Tell me about {}.", "How does {} work?", "Why is {} important?", "Write a poem about {}.",
                  "Write code for {}.", "What do you think about {}?", "Who invented {}?", "Can you explain {}?", "Describe {}.", "How do I learn {}?",
                  "What is the history of {}?", "Give me a plan for {}.", "Summarise {} in one sentence.", "Who is {}?", "When was {}?"])
    return q.format(u), r.choice(SORRY) + (" " + CAN if r.random() < 0.4 else "")


def list_turn(r):
    n = r.randint(2, 5)
    what, pool = r.choice([("animals", list(ANIMALS)), ("colours", COLOURS), ("days", DAYS), ("foods", FOODS), ("cities", list(CAPITALS.values()))])
    x = r.sample(pool, n)
    return r.choice([f"Name {NUMBERS[n]} {what}.", f"List {n} {what}.", f"Give me {NUMBERS[n]} {what}."]), \
        cap(", ".join(x[:-1]) + f" and {x[-1]}.")


def chat_turns(r):
    k = r.random()
    if k < 0.38:
        return story_turns(r)
    out = []
    for _ in range(r.choice([1, 1, 2, 3, 4])):
        k = r.random()
        if k < 0.34:
            out.append(sum_turn(r))
        elif k < 0.62:
            q, ans = fact(r)
            out.append((r.choice(q), ans))
        elif k < 0.84:
            q, ans = r.choice(SMALL_TALK)
            out.append((r.choice(q), r.choice(ans)))
        elif k < 0.93:
            out.append(unknown_turn(r))
        else:
            out.append(list_turn(r))
    if r.random() < 0.1:
        out += story_turns(r)
    return out


def render(turns, system=None):
    """The chat template's own text (tokenizer_config.json holds the same in Jinja)."""
    s = f"{OPEN}system\n{system}{CLOSE}\n" if system else ""
    return s + "".join(f"{OPEN}user\n{q}{CLOSE}\n{OPEN}assistant\n{ans}{CLOSE}\n" for q, ans in turns)


def chat(r):
    turns = [(noisy(r, q), ans) for q, ans in chat_turns(r)]
    return render(turns, r.choice(SYSTEMS) if r.random() < 0.25 else None)


WRITERS = dict(story=lambda r: story(r)[0], sum=sums, fact=facts, chat=chat)
SHARE = dict(story=0.20, sum=0.22, fact=0.10, chat=0.48)


def documents(seed):
    """An endless stream of (kind, text), the same for the same seed on every machine."""
    r = random.Random(f"moetrail bundled {seed}")
    kinds, weights = list(SHARE), list(SHARE.values())
    while True:
        k = r.choices(kinds, weights)[0]
        yield k, WRITERS[k](r) + END


if __name__ == "__main__":
    import itertools
    for k, t in itertools.islice(documents("show"), 30):
        print(f"[{k}] {t}\n")
