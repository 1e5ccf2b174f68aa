"""The vocabulary of the bundled toy: who lives where, and the small facts it may state."""

# animal -> (where it lives, the sound it makes or None)
ANIMALS = {
    "fox": ("forest", None), "owl": ("old oak tree", "hoot"), "bear": ("cave", "growl"),
    "rabbit": ("meadow", None), "mouse": ("barn", "squeak"), "duck": ("pond", "quack"),
    "frog": ("pond", "croak"), "cat": ("village", "meow"), "dog": ("village", "woof"),
    "hen": ("farm", "cluck"), "horse": ("farm", "neigh"), "sheep": ("meadow", "baa"),
    "cow": ("farm", "moo"), "pig": ("farm", "oink"), "goat": ("mountain", "maa"),
    "squirrel": ("forest", None), "hedgehog": ("garden", None), "badger": ("forest", None),
    "otter": ("river", None), "turtle": ("lake", None), "whale": ("sea", None),
    "crab": ("beach", None), "seal": ("sea", "bark"), "penguin": ("land of ice", None),
    "bee": ("garden", "buzz"), "ant": ("garden", None), "snail": ("garden", None),
    "lion": ("savanna", "roar"), "elephant": ("savanna", "trumpet"), "monkey": ("jungle", "chatter"),
    "wolf": ("forest", "howl"), "deer": ("forest", None), "crow": ("old oak tree", "caw"),
    "swan": ("lake", None), "mole": ("meadow", None), "bat": ("cave", None),
    "dragon": ("mountain", "roar"), "parrot": ("jungle", "squawk"),
}
LEGS = {"spider": 8, "ant": 6, "bee": 6, "crab": 10, "snail": 0, "whale": 0}
TWO_LEGS = {"owl", "duck", "hen", "penguin", "crow", "swan", "parrot", "bat"}
HE = ["Finn", "Tom", "Ben", "Max", "Otto", "Leo", "Sam", "Hugo", "Oscar", "Theo", "Jack", "Milo", "Paul", "Emil", "Noah"]
SHE = ["Anna", "Lily", "Mia", "Ruby", "Clara", "Nora", "Ella", "Ida", "Rosa", "Zoe", "Lucy", "Maya", "Greta", "Tess", "June"]
PEOPLE = ["girl", "boy", "baker", "farmer", "sailor", "king", "queen", "painter", "gardener", "teacher"]
GENDER = {"girl": "she", "queen": "she", "hen": "she", "cow": "she", "boy": "he", "king": "he"}
PEOPLE_HOME = ["village", "small house by the river", "town", "house on the hill", "cottage by the sea"]
TRAITS = ["small", "brave", "kind", "shy", "curious", "clever", "young", "old", "friendly", "quiet", "cheerful", "gentle"]
THINGS = ["key", "ball", "book", "hat", "bell", "lamp", "drum", "scarf", "coin", "kite", "cup", "ring", "map", "flute", "basket", "button"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "golden", "silver", "brown", "orange"]
PLACES = ["river", "garden", "forest", "beach", "hill", "bridge", "old mill", "meadow", "barn", "market", "lake", "path"]
FOODS = ["soup", "bread", "honey", "apples", "cake", "berries", "nuts", "cheese", "pancakes", "pears"]
FRUITS = ["apple", "pear", "plum", "egg", "cookie", "shell", "stone", "flower", "leaf", "book", "coin", "nut", "star", "pencil"]
PLURAL = {"leaf": "leaves", "cookie": "cookies"}
SKILLS = ["swim", "sing", "bake", "climb", "dance", "read", "paint", "whistle", "juggle", "skate"]
WEATHER = ["sunny", "rainy", "windy", "cold", "snowy", "foggy", "warm", "stormy"]
GOALS = ["the sea", "the top of the mountain", "the big city", "the end of the rainbow", "the north star", "the old castle", "the waterfall"]

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens", "Hungary": "Budapest",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia", "Peru": "Lima", "Chile": "Santiago",
    "Cuba": "Havana", "Russia": "Moscow", "Turkey": "Ankara", "Australia": "Canberra", "Belgium": "Brussels",
    "the United States": "Washington", "Switzerland": "Bern",
}
OPPOSITES = [("hot", "cold"), ("big", "small"), ("day", "night"), ("up", "down"), ("fast", "slow"), ("happy", "sad"),
             ("old", "young"), ("open", "closed"), ("left", "right"), ("hard", "soft"), ("wet", "dry"), ("light", "dark"),
             ("full", "empty"), ("early", "late"), ("loud", "quiet"), ("long", "short"), ("near", "far"), ("yes", "no"),
             ("black", "white"), ("good", "bad"), ("clean", "dirty"), ("strong", "weak")]
COLOUR_OF = {"the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a banana": "yellow",
             "a tomato": "red", "blood": "red", "coal": "black", "milk": "white", "a carrot": "orange",
             "the sea": "blue", "a leaf": "green", "chocolate": "brown", "a lemon": "yellow", "a cherry": "red"}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
SEASONS = ["spring", "summer", "autumn", "winter"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
           "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]
YOUNG = {"cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "horse": "foal", "hen": "chick", "duck": "duckling",
         "pig": "piglet", "bear": "cub", "frog": "tadpole", "swan": "cygnet", "goat": "kid"}
SHAPES = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
# Things the toy is asked about and must admit not to know.
UNKNOWN = ["quantum physics", "taxes", "the stock market", "Rust lifetimes", "black holes", "philosophy", "politics", "football",
           "chemistry", "the French revolution", "machine learning", "general relativity", "Shakespeare", "cooking rice", "Linux",
           "the theory of evolution", "history", "your training data", "the meaning of life", "cars", "airplanes", "music theory",
           "the internet", "computers", "democracy", "electricity", "the human brain", "dinosaurs", "volcanoes", "money", "love",
           "databases", "operating systems", "space travel", "vaccines", "grammar", "law", "poetry", "photosynthesis", "gravity",
           "World War II", "a bank account", "chess", "Python", "transformers", "the weather tomorrow", "the news", "genetics"]
