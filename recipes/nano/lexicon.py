"""The words of the nano world: what its people, places, companies and works can be like, and how each fact is said.

Every value of a closed attribute has three wordings, predicates that fit behind "the person who" or "the firm that".
The first contains the canonical short answer; no two wordings of one value share a content word.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """A closed attribute: `values[v]` is the canonical short answer, `wordings[v]` its three predicates."""

    key: str
    noun: str
    questions: tuple[str, ...]
    values: tuple[str, ...]
    wordings: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Link:
    """A name-valued fact: the subject's document names an entity of kind `target`."""

    key: str
    target: str
    questions: tuple[str, ...]
    wordings: tuple[str, ...]
    bridge: str


def _attribute(key: str, noun: str, questions: list[str], first: str, table: str) -> Attribute:
    """Reads a table of `canonical | second wording | third wording` lines; `first` words the canonical answer."""
    values, wordings = [], []
    for line in table.strip().splitlines():
        canonical, *others = (part.strip() for part in line.split("|"))
        article = "an" if canonical[0] in "aeiou" else "a"
        values.append(canonical)
        wordings.append((first.format(a=article, v=canonical), *others))
    questions = [f"What is the {noun} of {{S}}?", *questions]
    return Attribute(key, noun, tuple(questions), tuple(values), tuple(wordings))


KINDS = ("person", "place", "company", "work")

SUBJECTS = {
    "person": ("the person who", "the one who"),
    "place": ("the town that", "the place that"),
    "company": ("the firm that", "the company that"),
    "work": ("the work that", "the creation that"),
}

INTRODUCTIONS = {
    "person": ("{N}",),
    "place": ("{N}", "The town of {N}"),
    "company": ("{N}", "The firm {N}"),
    "work": ("{N}", "The work {N}"),
}

PRONOUNS = {
    "place": ("It", "The town", "The place"),
    "company": ("It", "The firm", "The company"),
    "work": ("It", "The work"),
}

ATTRIBUTES = {
    "person": (
        _attribute(
            "trade",
            "trade",
            ["What does {S} do for a living?"],
            "is {a} {v}",
            """
            glassblower | shapes molten bottles | works hot sand at a furnace
            baker | fills ovens with loaves | kneads dough at dawn
            blacksmith | hammers red iron | forges horseshoes
            tailor | stitches coats | cuts suits to measure
            doctor | heals the sick | treats patients
            teacher | runs a classroom | gives lessons to pupils
            fisher | hauls nets at sea | catches cod and herring
            lawyer | argues in court | defends the accused
            printer | sets type for newspapers | inks pages on a press
            shepherd | tends a flock | guards sheep
            carpenter | builds oak tables | planes timber
            astronomer | charts the stars | measures distant planets
            """,
        ),
        _attribute(
            "hobby",
            "hobby",
            ["What does {S} do for fun?"],
            "enjoys {v}",
            """
            chess | ponders rooks and bishops | collects famous checkmates
            gardening | grows roses | weeds flower beds
            swimming | does laps in a pool | dives into cold lakes
            dancing | loves the waltz | steps a lively tango
            archery | shoots arrows | draws a longbow
            painting | fills canvases | mixes watercolours
            knitting | makes woollen scarves | clicks needles and yarn
            climbing | scales cliffs | hangs from ropes
            fencing | duels with foils | crosses swords
            sailing | steers a small yacht | races dinghies
            magic | performs card tricks | pulls rabbits from hats
            poetry | rhymes at night | composes sonnets
            """,
        ),
        _attribute(
            "pet",
            "pet",
            ["Which animal does {S} keep?"],
            "keeps {a} {v}",
            """
            parrot | owns a talking bird | feeds a feathered mimic
            cat | lives with a purring mouser | adopted a tabby
            dog | walks a loyal hound | trains a terrier
            tortoise | shelters a slow shell | bought a hundred year old reptile
            pony | rides a little horse | saddles a shaggy mare
            goat | milks a bearded nanny | tethers a horned kid
            snake | houses a python | handles a coiled viper
            goose | raised a honking gander | was imprinted on by a gosling
            monkey | has a chattering ape | spoils a mischievous macaque
            rabbit | pampers a bunny | cuddles a hare with long ears
            owl | tamed a hooting hunter | lets a nocturnal raptor perch indoors
            ferret | carries a polecat | hides a weasel in a sleeve
            """,
        ),
        _attribute(
            "food",
            "favourite food",
            ["What does {S} like to eat?"],
            "loves {v}",
            """
            cheese | craves cheddar and brie | never skips ripe curds
            soup | slurps broth | empties bowls of stew
            pancakes | flips thin crepes | asks for batter with syrup
            mushrooms | gathers chanterelles | fries wild fungi
            oysters | swallows raw shellfish | opens molluscs with lemon
            chocolate | nibbles cocoa bars | hoards truffles
            plums | picks purple fruit | stews damsons
            noodles | twirls spaghetti | boils long pasta
            honey | licks the comb | spreads nectar on toast
            sausages | grills bratwurst | buys smoked links
            pickles | eats sour gherkins | crunches cucumbers in vinegar
            pudding | finishes custard | spoons sweet trifle
            """,
        ),
        _attribute(
            "fear",
            "fear",
            ["What is {S} afraid of?"],
            "fears {v}",
            """
            thunder | hides during storms | trembles at loud rumbles
            spiders | flees anything on eight legs | dreads cobwebs
            heights | avoids ladders | grows dizzy on towers
            darkness | sleeps beside a lamp | panics without light
            crowds | shuns busy squares | hates throngs
            ghosts | believes in haunting | is scared by phantoms
            mirrors | covers every looking glass | will not face a reflection
            wolves | shudders at howling | worries about fanged packs
            clowns | dislikes circus jesters | is alarmed by red noses
            bees | runs from stings | cannot bear buzzing swarms
            fire | recoils from flames | douses each candle
            needles | faints at injections | refuses any syringe
            """,
        ),
    ),
    "place": (
        _attribute(
            "setting",
            "setting",
            ["What does {S} lie beside?"],
            "lies beside a {v}",
            """
            river | straddles a broad stream | hugs flowing water
            desert | borders endless dunes | faces dry sand
            forest | nestles among tall trees | is ringed by woodland
            volcano | sits below a smoking crater | is built on old lava
            marsh | rises from reedy bogs | stands in a swamp
            glacier | overlooks creeping ice | clings to a frozen slope
            canyon | perches above a gorge | fills a deep ravine
            lake | mirrors itself in calm depths | rims an inland basin
            bay | curves round a sheltered cove | opens to the sea
            meadow | spreads over grassland | adjoins lush pasture
            waterfall | hears a roaring cascade | catches spray from plunging rapids
            cave | covers underground caverns | hides a hollow grotto
            """,
        ),
        _attribute(
            "landmark",
            "landmark",
            ["What do visitors see in {S}?"],
            "has a famous {v}",
            """
            lighthouse | guides ships by a beacon | shines a lamp for sailors
            cathedral | is proud of its tall spire | draws pilgrims to a vast nave
            bridge | spans a gap with stone arches | boasts an old viaduct
            castle | is watched by a fortress | keeps its knightly keep
            windmill | grinds corn with turning sails | lets breezes drive a wheel
            library | stores rare books | shelves a million volumes
            theatre | puts plays on a stage | seats an audience nightly
            palace | shows a royal residence | houses a king in marble
            observatory | owns a giant telescope | studies planets under a dome
            fountain | cools its square with jets | spouts from bronze dolphins
            prison | locks thieves in cells | guards a grim jail
            university | teaches many students | awards degrees to scholars
            """,
        ),
        _attribute(
            "weather",
            "weather",
            ["What is the sky like in {S}?"],
            "knows much {v}",
            """
            fog | vanishes in thick mist | is veiled by haze
            snow | is white most of the year | shovels flakes and drifts
            rain | needs umbrellas daily | endures constant showers
            wind | is swept by gales | feels strong gusts
            heat | bakes at noon | swelters
            hail | dodges icy pellets | mends dented roofs
            frost | freezes overnight | wakes to rime
            sunshine | gets bright days | basks under clear skies
            lightning | sees flashes and bolts | wears metal rods against thunderclaps
            dust | sweeps blown grit | coughs in dirty air
            rainbows | admires coloured arcs | glows with sevenfold bows
            drought | waits for a drop | suffers parched months
            """,
        ),
        _attribute(
            "crop",
            "crop",
            ["What do the farmers of {S} grow?"],
            "grows {v}",
            """
            olives | presses green oil | tends silvery groves
            grapes | prunes vineyards | ferments wine
            wheat | reaps golden grain | mills flour
            apples | harvests orchards | brews cider
            tea | plucks leaves on terraces | dries fragrant infusions
            rice | floods its paddies | plants seedlings in mud
            cotton | spins soft bolls | bales white fibre
            saffron | picks crocus threads | sells a costly yellow spice
            potatoes | digs tubers | peels humble spuds
            pumpkins | carves orange gourds | bakes squash pies
            hops | supplies breweries | flavours beer with climbing vines
            tulips | exports bulbs | paints fields with petals
            """,
        ),
        _attribute(
            "feast",
            "feast",
            ["What is celebrated in {S}?"],
            "holds a feast of {v}",
            """
            lanterns | hangs paper lights | floats candles every autumn
            masks | hides all faces at carnival | parades in disguise
            bells | rings chimes for a week | peals until midnight
            kites | flies silk shapes on strings | fills april with soaring toys
            barrels | rolls casks downhill | races wooden tubs
            bonfires | burns heaps of logs | leaps over blazes
            boats | rows a regatta | decks its canoes
            puppets | stages marionette shows | makes dolls walk
            giants | marches with huge figures | honours tall ogres
            drums | beats tambours | pounds rhythms all summer
            crowns | elects a mock queen | gives a child the throne
            feathers | dresses in plumes | wears quills and down
            """,
        ),
    ),
    "company": (
        _attribute(
            "product",
            "product",
            ["What does {S} sell?"],
            "sells {v}",
            """
            clocks | makes timepieces | offers ticking pendulums
            umbrellas | keeps customers dry | folds shelters from showers
            bicycles | builds two wheelers | assembles pedals and spokes
            soap | boils bars for washing | supplies scented lather
            candles | dips wax tapers | moulds tallow with wicks
            carpets | weaves rugs | knots woollen floors
            telescopes | grinds lenses for stargazers | ships optical tubes
            boots | stitches leather footwear | soles shoes
            paper | pulps rags into sheets | trades in reams
            locks | secures doors | produces bolts with keys
            perfume | bottles fragrance | distils sweet scents
            kites | tethers flying toys | stretches silk for the wind
            """,
        ),
        _attribute(
            "founder",
            "founder",
            ["Who started {S}?"],
            "was founded by {v}",
            """
            twins | owes its birth to two sisters | began with identical siblings
            sailors | was set up by a retired crew | started among old mariners
            monks | arose in a monastery | goes back to praying brothers
            students | grew from a campus club | was launched at college
            widow | was opened by a bereaved wife | traces itself to a woman in mourning
            soldiers | was formed by veterans | sprang from a disbanded regiment
            inventor | came out of a tinkerer's shed | rests on one patent
            actors | originated with a stage troupe | was dreamt up by players
            farmers | was created by ploughmen | stems from a rural cooperative
            baron | was financed by a nobleman | had a titled lord behind it
            orphans | was begun by parentless children | came from foundlings
            exiles | was established by refugees | commenced among banished folk
            """,
        ),
        _attribute(
            "emblem",
            "emblem",
            ["What does the sign of {S} show?"],
            "has {a} {v} as emblem",
            """
            fox | displays a sly red tail | stamps a vixen on boxes
            anchor | prints a ship's hook | shows mooring iron
            rose | bears a thorny bloom | is marked by a scarlet blossom
            lion | flies a maned beast | flaunts the king of cats
            crown | wears a golden coronet | is signed with a royal diadem
            star | uses five bright points | chose a twinkling shape
            whale | paints a spouting giant | adopted a leviathan
            hand | waves an open palm | depicts five fingers
            swan | pictures a white waterbird | embosses a long necked cygnet
            acorn | puts oak seed on labels | draws a squirrel's nut
            key | engraves a door opener | hangs an unlocking tool
            moon | carries a silver crescent | brands goods with lunar light
            """,
        ),
        _attribute(
            "quarters",
            "building",
            ["Which building does {S} occupy?"],
            "occupies {a} {v}",
            """
            mill | works between grindstones | uses a flour house by a weir
            chapel | fills old pews | operates under an altar
            barn | moved into a hay loft | shares rafters with swallows
            ship | floats on a moored hull | keeps desks below deck
            tower | climbs a spiral stair to work | is stacked ten floors high
            cellar | toils underground | rents a vaulted basement
            station | sits on a disused platform | took over railway halls
            brewery | smells of former malt | stands among copper vats
            school | writes on blackboards | inherited classrooms
            stable | meets where horses slept | converted stalls and mangers
            greenhouse | sits under glass | warms among potted palms
            hospital | turned wards into offices | lodges where nurses worked
            """,
        ),
        _attribute(
            "perk",
            "gift to workers",
            ["What do workers get from {S}?"],
            "gives workers {v}",
            """
            soup | ladles free broth | serves staff a hot bowl
            naps | lets people doze after lunch | sets out beds for siestas
            songs | hires a choir | starts mornings with hymns
            bicycles | lends two wheels | buys everyone pedals
            gardens | hands out allotments | offers each clerk a vegetable plot
            books | stocks novels for employees | runs a reading room
            holidays | grants long leave | closes all august
            coal | heats homes in winter | sends black fuel
            hats | dresses heads in felt | presents bowlers and caps
            massages | rubs tired backs | pays for kneaded shoulders
            oranges | passes round citrus | peels fruit at noon
            tickets | treats teams to theatre | provides seats for shows
            """,
        ),
    ),
    "work": (
        _attribute(
            "form",
            "form",
            ["What kind of thing is {S}?"],
            "is {a} {v}",
            """
            novel | fills five hundred pages | has thirty chapters
            opera | needs sopranos and tenors | is sung with an orchestra
            statue | is carved from marble | stands on a plinth
            poem | consists of rhymed stanzas | scans in couplets
            map | shows roads and borders | charts every coast
            tapestry | is woven in wool | hangs as stitched cloth
            film | is projected on a screen | runs through cinemas
            mosaic | is set in tiny tiles | joins coloured pebbles
            symphony | asks for strings and brass | has four movements
            cookbook | lists recipes | explains sauces and roasts
            dictionary | defines words | goes from a to z
            puzzle | must be solved | teases with a riddle
            """,
        ),
        _attribute(
            "theme",
            "theme",
            ["What is {S} about?"],
            "deals with {v}",
            """
            shipwreck | follows a lost crew | tells of a sunken vessel
            wedding | brings bride and groom together | concerns a marriage
            revenge | repays an old wrong | turns on getting even
            famine | recalls hungry years | portrays starving villages
            treasure | hunts buried gold | is full of pirate chests
            childhood | remembers early youth | looks back at growing up
            war | describes battles | mourns fallen soldiers
            dragons | features winged monsters | bristles with scaly beasts
            winter | celebrates ice | evokes the coldest season
            jealousy | explores envy | warns of green eyed suspicion
            justice | weighs law and mercy | puts a judge on trial
            travel | wanders abroad | roams foreign lands
            """,
        ),
        _attribute(
            "patron",
            "patron",
            ["Who paid for {S}?"],
            "was paid for by {a} {v}",
            """
            queen | was ordered by a female monarch | pleased her majesty
            bishop | had church money | was commissioned by a prelate
            banker | drew on a lender's vault | was funded through loans
            merchant | was bought by a trader | owed thanks to a spice dealer
            general | was requested by an army chief | flattered a commander
            guild | was backed by craftsmen | got support from united artisans
            innkeeper | was traded for tavern meals | settled a landlord's bill
            duchess | was sponsored by a noble lady | honoured a duke's wife
            mayor | used town hall funds | was approved at city council
            miller | cost sacks of flour | was swapped for ground corn
            captain | spent a skipper's savings | was wanted on board
            abbot | was meant for a monastery | served cloister brethren
            """,
        ),
        _attribute(
            "fate",
            "fate",
            ["What happened to {S}?"],
            "was {v}",
            """
            stolen | was taken by thieves | vanished in a robbery
            burned | perished in flames | ended as ashes
            banned | was forbidden by censors | is outlawed
            copied | exists in many forgeries | is often imitated
            buried | lies under earth | went into a grave
            drowned | was swept off by a flood | sank in deep water
            forgotten | slipped from memory | nobody recalls
            auctioned | fell under the hammer | went to the highest bidder
            restored | was cleaned and repaired | regained its old beauty
            hidden | was kept in a secret room | stayed behind a false wall
            translated | appeared in nine languages | speaks foreign tongues
            praised | won every prize | delighted all critics
            """,
        ),
        _attribute(
            "effort",
            "making time",
            ["How long did {S} take?"],
            "took {a} {v}",
            """
            day | was done between breakfast and supper | was finished by sunset
            week | needed seven mornings | lasted monday to sunday
            month | required thirty dawns | filled one page of the calendar
            year | demanded four seasons | saw spring come back once
            decade | kept its maker busy ten summers | grew through two lustrums
            lifetime | was continued until death | used up all of a career
            night | was ready at cockcrow | was born from dusk till morning
            hour | ate sixty minutes | was over before tea cooled
            century | passed through generations | outlasted grandchildren
            summer | absorbed june and july | stretched over hot months
            weekend | occupied two free days | went from friday until rest ended
            minute | came in a flash | was dashed off at once
            """,
        ),
    ),
}

LINKS = {
    "person": (
        Link(
            "birthplace",
            "place",
            ("Where was {S} born?", "What is the birthplace of {S}?"),
            ("was born in {N}", "comes from {N}", "is a native of {N}"),
            "is the birthplace of",
        ),
        Link(
            "employer",
            "company",
            ("Which firm employs {S}?", "What is the employer of {S}?"),
            ("works for {N}", "earns wages at {N}", "is employed by {N}"),
            "employs",
        ),
    ),
    "place": (
        Link(
            "governor",
            "person",
            ("Who governs {S}?", "What is the name of the governor of {S}?"),
            ("is governed by {N}", "has {N} as mayor", "is ruled by {N}"),
            "governs",
        ),
    ),
    "company": (
        Link(
            "seat",
            "place",
            ("Where is {S} based?", "What is the seat of {S}?"),
            ("is based in {N}", "has its seat in {N}", "trades from {N}"),
            "is the seat of",
        ),
    ),
    "work": (
        Link(
            "maker",
            "person",
            ("Who made {S}?", "What is the name of the maker of {S}?"),
            ("was made by {N}", "is the idea of {N}", "comes from the hand of {N}"),
            "made",
        ),
    ),
}

NAME_QUESTIONS = {
    "person": ("Who is {S}?", "What is the name of {S}?"),
    "place": ("Which town is {S}?", "What is the name of {S}?"),
    "company": ("Which firm is {S}?", "What is the name of {S}?"),
    "work": ("Which work is {S}?", "What is the name of {S}?"),
}

# A name is one beginning and one ending (a person has two such words), so that unseen names consist of seen pieces.
BEGINNINGS = (
    "Bal Ber Bor Bram Cal Cor Dal Dar Del Dor Dun Fal Fen Fin Gal Gar Gil Gor Hal Har Hel Hol Jal Jor Kal Kel Kir Kol "
    "Lan Lor Lun Mal Mar Mel Mir Mor Nal Nev Nor Pel Per Quin Ral Rav Rin Ros Sal Sel Sil Sor Tal Tam Tor Tul "
    "Val Var Vel Vin Vor Wil Yar Yor Zan Zel Zor"
).split()
ENDINGS = {
    "first": "a an ia el en ic in is ith o on or us wen win yn ys".split(),
    "last": "berg by dahl gard king lund man ner quist sen shaw sky son stein thal tov well wood".split(),
    "place": "bury dale fell ford ham haven holm keep mere mont mouth port stad stow ton wick worth zee".split(),
    "company": "bert cor dex dine fax gen lex line lux max mex nex pax ram sta tek tron vex".split(),
    "work": "adne alis anta aria ava ella enne esca iad idor illo imar inda ion ola osa una ymp".split(),
}
