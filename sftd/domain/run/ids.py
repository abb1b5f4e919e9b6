"""Run ids: short, readable and pronounceable, such as `brave-otter-3f2a`."""

from __future__ import annotations

import hashlib
import re

_FIRST = (
    "amber agile azure bold brave bright brisk calm clear clever cosmic crisp deep eager early fair fast fine fleet "
    "fresh gentle glad golden grand green happy honest jolly keen kind light lively lucky lunar mellow merry mighty "
    "mild neat noble polar proud quick quiet rapid ready royal sharp silent silver sleek smart snowy solar steady "
    "stout sunny swift tidy vivid warm wise witty zesty able active airy alert alpine ample ancient apt arctic artful "
    "astral austere autumn avid balmy basic beaming blithe blue breezy bronze brown candid careful casual cheery "
    "chief chosen civic civil classic clean close coastal cobalt coral cordial cosy crafty crimson crystal curious "
    "curly cyan dainty dapper daring dear decent deft dense devoted direct distant dreamy dusky dusty earnest earthy "
    "easy elated elegant elfin epic equal even exact exotic famous fancy feisty fertile festive fiery final firm fit "
    "floral fluent fluffy fond frank free frosty frugal fuzzy gallant gaudy genial giant gifted giving glossy good "
    "gray handy hardy hazel hearty heroic hidden hollow honey humble icy ideal indigo inner ivory jade jaunty jovial "
    "joyful joyous just knowing large lasting lavish leafy level lilac limber linen little logical long loud loyal "
    "lucid lush magic major maple marble meek mindful minor misty modern modest mossy mystic native nimble nordic "
    "novel oaken oceanic olive opal open orange organic ornate pastel patient peach pearly perky placid plain plucky "
    "plum polite prime prompt pure purple quaint radiant rare red refined regal rich robust rosy round ruby rural "
    "rustic sable sacred safe sandy satin scarlet secure serene shiny simple"
).split()
_SECOND = (
    "badger bear beaver bison crane condor cougar coyote deer dingo dolphin dove eagle egret elk falcon ferret finch "
    "fox gecko gibbon goose hare hawk heron ibex ibis jaguar jay koala lark lemur lion llama lynx marmot marten mole "
    "moose newt ocelot orca osprey otter owl panda pika plover puffin puma quail raven robin salmon seal shrew "
    "sparrow stork swan tapir tern tiger toucan trout adder agouti akita alpaca anchovy asp auk avocet axolotl baboon "
    "barbet bass bat beagle bee beetle beluga bittern boa boar bobcat bonobo bream budgie buffalo bulbul bunting "
    "bustard buzzard caiman camel canary caracal caribou carp cat catfish cheetah chicken chough cicada civet clam "
    "cobra cod colt conch coot corgi crab cricket crow cuckoo curlew cuttle dace darter dassie donkey drake drongo "
    "duck dugong dunlin eel eland emu ermine fawn foal fossa frog fulmar gannet gar gaur gazelle gerbil gharial "
    "giraffe gnat gnu goat gopher goral grebe grouse guan gull guppy haddock hake halibut hamster harrier heifer "
    "hermit herring hippo hobby hoopoe hornet horse hound husky hyena hyrax iguana impala indri jacana jackal jackdaw "
    "jerboa kakapo kea kestrel kite kiwi kudu ladybug lamb lamprey langur limpet linnet lizard lobster loon loris "
    "lory macaque macaw magpie mallard mamba manatee manta mantis margay martin mastiff merlin mink minnow monkey "
    "moth mouse mule mullet muskox mussel myna narwhal numbat nyala octopus okapi opossum oriole oryx ostrich oyster "
    "parrot peacock pelican penguin perch petrel pigeon pike pipit polecat pony poodle possum prawn python quagga "
    "quokka rabbit raccoon ram ray rhea rhino roach rook rooster ruff saiga sardine"
).split()


# A safe folder name: one path segment, not hidden, not `..`.
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def is_run_id(text: str) -> bool:
    """Whether a text is a valid run id. Folders have run ids as names, so an untrusted id must be checked first."""
    return _SAFE.fullmatch(text) is not None


def run_id(random: bytes) -> str:
    """A readable id from 4 random bytes: 256 × 256 names, then 16 bits."""
    a, b, c, d = random[:4]
    return f"{_FIRST[a % len(_FIRST)]}-{_SECOND[b % len(_SECOND)]}-{c:02x}{d:02x}"


# The maximum bytes of a folder name, which leaves room for suffixes.
_FOLDER_BYTES = 200
_PLAIN = re.compile(r"[\w.@+ -]")


def folder_name(name: str) -> str:
    """A display name as a folder name: letters, digits, spaces and `_.@+-` are kept, others become `%XX`. Different names give
    different folders."""
    text = "".join(c if _PLAIN.fullmatch(c) else "".join(f"%{b:02X}" for b in c.encode()) for c in name)
    if text[:1] in (".", "-"):
        # The folder must not be hidden, or look like an option of a command.
        text = f"%{ord(text[0]):02X}{text[1:]}"
    if len(text.encode()) <= _FOLDER_BYTES:
        return text
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{text.encode()[: _FOLDER_BYTES - 20].decode(errors='ignore')}-{digest}"
