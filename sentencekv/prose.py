"""Varied prose of our own, deterministic for a seed: a haystack that repeats itself hardly ever and is nobody's book.

A text has one town, a handful of people and places that recur, and chapters of narrative, description, dialogue,
letters, lists and account books. It knows nothing of tokens, models or sentences as the engine counts them.
"""

import random
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou]|hour\b|honest\b|heir\b|8\b|11\b|18\b|8\d\b)(?!one\b|once\b|us[eu]|uni|eu)")
_AFTER_QUESTION = re.compile(r"\?(?:\.{1,3}|[,;!])")
_NEW_SENTENCE = re.compile(r"\?; (\w)")
_DOUBLE_STOP = re.compile(r"(?<!\.)\.\.(?!\.)")
_MIN_WORDS, _MAX_WORDS = 4, 45
_NUM_TRIES = 12


def _bank(text: str) -> tuple[str, ...]:
    """One entry per line, or per `|` within a line."""
    return tuple(entry.strip() for line in text.strip().splitlines() for entry in line.split("|") if entry.strip())


_GRAMMAR: dict[str, tuple[str, ...]] = {
    "adj": _bank("""
        narrow|plain|grey|painted|crooked|borrowed|heavy|tarnished|faded|damp|ancient|well-made|shabby|handsome|brittle
        green|yellow|patched|unfinished|ordinary|polished|dusty|half-empty|foreign|solid|lopsided|blue|forgotten
        secondhand|broken|expensive|iron|oaken|battered|cheap|curious|large|small|neat|clumsy|scorched|whitewashed
    """),
    "thing": _bank("""
        lantern|basket|clock|coat|chest|map|saddle|barometer|kettle|ladder|spyglass|fiddle|trunk|umbrella|compass|bell
        hammer|candlestick|birdcage|ledger|mirror|wheelbarrow|bundle of letters|coil of rope|sack of barley|jar of honey
        pair of boots|box of nails|roll of canvas|bottle of ink|string of onions|crate of oranges|bag of seed
        tin whistle|almanac|telescope|snuffbox|walking stick|set of scales|portrait|teapot|fishing net|spool of thread
        wooden horse|music stand|iron key|silver spoon|account book|bolt of linen|pot of paste|parcel|cask of cider
        wicker chair
    """),
    "things": _bank("""
        candles|herrings|bricks|barrels|hymn books|planks|lamps|buttons|pears|tiles|blankets|saddlebags|inkwells|hinges
        oars|cheeses|eggs|kettles|window frames|pamphlets|sheepskins|ropes|shutters|bootlaces|ducks|cabbages|postcards
        spades|cups|newspapers|flowerpots|seedlings|spoons|clay pipes|feathers|sacks|loaves|tickets|fence posts|mirrors
    """),
    "surface": _bank("""
        kitchen table|windowsill|counter|bench by the door|lid of the piano|lowest shelf|workbench|step|mantelpiece|desk
        stone wall|edge of the well|upturned boat|pile of sacks|bureau|chair nearest the fire|counterpane|stable door
    """),
    "material": _bank("oak|brass|slate|clay|wicker|canvas|pewter|cork|elm|copper|horn|felt|granite|tin|walnut|leather"),
    "weather": _bank("""
        a thin rain|fog from the river|a hard frost|a dry east wind|the first snow|a warm drizzle|a heavy dew|low cloud
        a spell of heat|a gale from the south-west|bright and useless sunshine|a cold mist|thunder without rain|sleet
    """),
    "season": _bank("""
        early spring|late autumn|the middle of winter|the haymaking|the week after Easter|the end of harvest|a wet June
        the dark part of November|the lambing season|the last days of August|the herring season|the short days
    """),
    "time": _bank("""
        in the morning|before breakfast|at about {clock}|toward evening|the next day|on the following {day}|by noon
        that same night|a week later|some time after {clock}|on {day}|within the hour|as soon as it was light|at dusk
        at the end of the week|two days before the fair|on the {ordinal} of {month}|when the shops had shut|after supper
        for the {ordinal} time that year|during {season}|at high water|long before the others were awake|by and by
    """),
    "clock": _bank("""
        four o'clock|half past six|a quarter to nine|eleven|ten minutes past two|7 a.m.|half past three|noon|five
        twenty to eight|a quarter past ten|9 p.m.|midnight|half past one|3 p.m.|ten to twelve
    """),
    "day": _bank("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday|market day"),
    "month": _bank("January|February|March|April|May|June|July|August|September|October|November|December"),
    "ordinal": _bank("second|third|fourth|fifth|sixth|seventh|ninth|tenth|12th|17th|19th|21st|23rd|25th|28th|30th"),
    "count": _bank("two|three|four|five|six|seven|eight|nine|eleven|a dozen|fourteen|sixteen|twenty|thirty|forty"),
    "digits": _bank("12|15|18|20|24|27|31|36|40|45|48|52|60|64|75|80|96|110|125|144|160|200|240|310|365|480|612|1,200"),
    "span": _bank("""
        a fortnight|three days|half a lifetime|most of the winter|an afternoon|eleven years|nearly a month|an hour or so
        two summers|some weeks|the whole of one night|a year and a half|longer than anyone expected|ten minutes
    """),
    "sound": _bank("""
        a door closing|someone sawing wood|a cart on the cobbles|a flock of geese|a piano badly played|a loose shutter
        the mill wheel|two dogs quarrelling|a kettle coming to the boil|rain in the gutter|hammering from the boatyard
        children reciting a lesson|an argument about the price of hay|the organ being tuned|somebody laughing upstairs
    """),
    "smell": _bank("""
        tar and wet rope|boiled cabbage|beeswax|new bread|wood smoke|damp wool|horses|vinegar|old paper|cut grass|soap
        paraffin|drying herbs|low tide|roasting coffee|sawdust|apples kept too long|lamp oil|mutton fat|whitewash
    """),
    "mood": _bank("""
        patiently|without any hurry|in a low voice|rather stiffly|with great care|as if it were of no importance|at once
        for no good reason|more from habit than hope|with visible relief|half in jest|under protest|quite openly
        with {his} back to the light|in {his} usual roundabout way|without looking up|in the manner of a clerk|gravely
    """),
    "matter": _bank("""
        the price of coal|the new bridge|the drains in {street}|the missing {thing}|the lease of {place}|the ferry
        {person}'s will|the school roof|the quarrel over the boundary wall|the election|the bell that would not ring
        the damaged {things}|the subscription for the widow|the railway survey|the harvest supper|the state of the road
        the wreck of the {ship}|the closing of {place}|a debt of {digits} pounds|the vicar's sermon|the wages of the men
        the cracked {thing}|the right of way past {place}|a rumour from {far}|the lost dog|the flood of '{year2}
    """),
    "ship": _bank("Constant Anne|Merlin|Two Sisters|Halcyon|Provident|Northern Star|Good Intent|Marigold|Curlew"),
    "year2": _bank("31|38|42|47|53|56|61|64|69|72|77|83|88"),
    "year": _bank("1787|1794|1803|1811|1816|1822|1829|1834|1840|1846|1851|1857|1862|1868|1873|1879|1884"),
    "far": _bank("Lisbon|the capital|Bergen|Trieste|the colonies|Antwerp|Riga|the north|Cadiz|Hamburg|the coast|Leith"),
    "animal": _bank("cat|donkey|old spaniel|jackdaw|grey mare|goat|parrot|terrier|carthorse|tame hare|gander|tortoise"),
    "idea": _bank("""
        a promise is a kind of debt|nothing is mended by shouting at it|most news is old by the time it arrives
        a small town forgives slowly and forgets more slowly still|the tide keeps better time than the church
        people seldom read what they have signed|a good roof is worth two good relations|every bargain has a back door
        no one is as busy as a person avoiding a letter|the truth was generally duller than the rumour
        money borrowed in spring is hard to find in autumn|silence is easily taken for agreement
        the shortest road is rarely the driest|a thing put away safely is a thing lost
        one ought to count twice and pay once|there is no such thing as a temporary shed
        kindness costs about as much as coal|the young suppose that the old have always been so
        habit does the work of three servants|an empty room is the hardest to tidy
    """),
    "vp": _bank("""
        put {his} {thing} on the {surface}|carried a {adj} {thing} from {place} to {place}|counted the {things} twice
        asked {person} about {matter}|said {mood} that {matter} could wait|wrote {count} pages about {matter}
        sold {his} {adj} {thing} to {person} for {digits} shillings|walked as far as {place} and came back by {street}
        had been expecting {person} for {span}|took no interest in {matter}
        mended the {adj} {thing} with a piece of {material}|waited for {span} outside {place}|listened to {sound}
        would not hear a word against {person}|hid the {thing} behind the {thing2}|gave the {animal} something to eat
        read the notice on the door of {place}|pretended to examine the {adj} {thing}
        explained {matter} to {person}, {mood}|went down to {place} to see about the {things}
        lost {his} temper over {matter}|borrowed a {thing} made of {material} and never returned it
        complained of {sound}|lit the lamp and looked for the {thing}|spent {span} sorting {things}
        agreed, {mood}, to speak to {person}|dreamed of {far} and woke to {sound}
        paid {person} what was owing for the {things}|set {count} {things} in a row along the {surface}
        shut the door on {person}|refused to discuss {matter} before {clock}|found a {adj} {thing} under the {things}
        ate {his} supper alone, thinking of {far}|measured the {surface} with a piece of string
        showed {person} the {adj} {thing} from {far}|left for {far} without the {thing}
        stood at the window of {place} and watched {weather} come in|remembered {person} as a child in {street}
        repeated to {person} what had been said at {place}|made a list of {things}, {things2} and one {adj} {thing}
        forgot the {thing} and had to go back for it|offered {person} a seat by the fire at {place}
        quarrelled {mood} with {person}|tore up a letter from {far}
        bought {count} {things} at a price that made {person} laugh|locked up {place} at {clock}
        tied the {animal} to a post near {place}|kept a {thing} of {material} that had come from {far}
        painted the {surface} {colour}|dropped a {adj} {thing} and said nothing of it|took the long way round by {place}
        promised {person} a {adj} {thing}|turned over the pages of an old {thing2} without reading them
        drew a plan of {place} on the back of a bill|could smell {smell} before reaching {place}
        told the story of the {ship} once more|swept the floor of {place} {mood}
        hung the {adj} {thing} where {person} was sure to see it|had the {things} sent round by {street}
        slept through {sound}
    """),
    "thing2": _bank("atlas|dresser|screen|prayer book|coal scuttle|curtain|cupboard|magazine|pattern book|woodpile"),
    "things2": _bank("pickled walnuts|brushes|nails|gloves|corks|wax seals|hens|turnips|slates|lengths of chain"),
    "colour": _bank("white|a dull red|green|the colour of mustard|black|sky blue|a brown that pleased nobody|grey"),
    "rel": _bank("""
        had once kept a shop in {far}|had never been further than {place}|owed money to {person}
        was said to own {count} {things}|had come to {town} in {year} with nothing but a {thing}
        knew more than most about {matter}|distrusted every {adj} {thing}|had buried two husbands and a {animal}
        kept {his} accounts in pencil|could not abide {sound}|was related to {person}|had been a sailor on the {ship}
        played the fiddle at weddings|spoke of {far} as other people speak of heaven|slept badly during {season}
        walked with a stick of {material}|had opinions on {matter}|collected {things}
    """),
    "part": _bank("""
        {walking} past {place}|tired of {matter}|still holding the {adj} {thing}|having no wish to meet {person}
        in spite of {weather}|with one eye on the {animal}|encouraged by {person}|remembering the {things}
        against the advice of {person}|after {span} of indecision|wrapped in a {adj} coat|smelling faintly of {smell}
        on hearing {sound}|having slept until {clock}
    """),
    "walking": _bank("hurrying|strolling|limping|driving slowly|coming down|creeping|wandering"),
    "scene": _bank("""
        {weather} lay over {place}|{street} was empty|the {things} were still wet|a {adj} {thing} hung in the doorway
        the lamps were lit along {street}|nobody had swept the yard of {place}|the {animal} slept on the {surface}
        {sound} went on as before|{weather} had emptied the market|the whole of {place} smelled of {smell}
        one could hear {sound} somewhere behind {place}|the river had risen to the {ordinal} step
        a boy was selling {things} by the gate|the {things} had been stacked against the wall
        smoke went straight up from {place}|the church clock said {clock}, which was wrong
        {count} {things} stood in the road
    """),
    "narrative": _bank("""
        {lead} {lead_vp}.|{lead} {lead_vp}, and {lead_vp}.|{time}, {lead} {lead_vp}.
        {time}, {lead} {lead_vp}, though {scene}.|when {lead} {lead_vp}, {other} {other_vp}.|{part}, {lead} {lead_vp}.
        {lead}, who {lead_rel}, {lead_vp}.|{scene}, and {lead} {lead_vp}.|{lead} {lead_vp} because {other} {other_vp}.
        {lead} {lead_vp}; {other} {other_vp}.|it was {other} who {other_vp}, not {lead_full}.
        nobody at {place} knew why {lead} {lead_vp}.|{lead} {lead_vp}, but {other} {other_vp}.
        {lead} {lead_vp}, {lead_vp} and, {time}, {lead_vp}.|although {scene}, {lead} {lead_vp}.
        if {other} {other_vp}, {lead} did not mention it.|{time} {scene}, so {lead} {lead_vp}.
        {lead} {lead_vp} while {other} {other_vp}.|{scene}.|by {clock} {lead} {lead_vp}.
        neither {person} nor {person2} noticed that {lead} {lead_vp}.
        {lead} {lead_vp} - or so {other} believed - and {lead_vp}.
        {time}, part of the truth came out: {lead} {lead_vp}, and {other}, who {other_rel}, {other_vp}.
        {lead} {lead_vp} ({other} {other_vp}).|{lead} had two reasons for it: {matter}, and {matter2}.
        all through {season}, {lead} {lead_vp}, until at last {other} {other_vp}.
        some said that {lead} {lead_vp}; others, that {other}, {other_part}, {other_vp}.
        was it possible that {lead} {lead_vp}?|the {ordinal} of {month} was the day on which {lead} {lead_vp}.
        {lead} {lead_vp} before {other}, {other_part}, {other_vp}.
        for {span} {lead} {lead_vp}, and in all that time {other} {other_vp} only once.|no, {lead} {lead_vp}.
    """),
    "matter2": _bank("""
        an unwillingness to be thanked|the hope of a reply from {far}|the price of {things}|{weather}
        a promise made to {person}|simple idleness|the {adj} {thing}|what {person} might say|a cold that would not mend
        the advice of {person}
    """),
    "description": _bank("""
        {place} stood at the end of {street}, between a {adj} wall and a yard full of {things}.
        {there_was} on the {surface}.|the room held a {adj} {thing}, {count} {things}, and {smell_np}.
        from the window one could see {place}, and beyond it {place}.
        the walls were {colour}, the floor was {material}, and the only {adj} object was a {thing}.
        everything there smelled of {smell} and {smell2}.
        in {season} the place was cold; in {season} it was hardly better.
        {weather} had got into the {things} and spoiled them.
        on the left hung a {thing} of {material}, and on the right, for no reason, another.
        it had been built in {year}, and it looked it.
        visitors noticed first the {adj} {thing}, then the {things}, and last of all {person}.
        whoever built it had thought of {far}.|a path of crushed {material} led to {place}, where {scene}.
        the {things} were kept in the cellar, {count} to a shelf.
        at {clock} the light reached the {surface} and showed the dust on the {things}.
        there were {digits} {things} in all, most of them {adj}.
        the {adj} {thing} in the corner had come from {far} on the {ship}.
        behind the {thing2} someone had written a name and the year {year}.
        it was said that the foundations were older than {town} itself.
        nothing had been moved there since {person} left for {far}.
        the gate, which was {adj}, opened upon {count} steps and a view of {place}.
        {sound} could be heard through the wall at all hours.
        a {animal} had made its bed among the {things}, and it was thought unlucky to disturb it.
        the stairs were {adj} and the rail was {adj}.
        it measured {digits} feet by {digits2}, according to {person}, who {person_rel}.
        the sign over the door showed a {thing} and {count} {things}.
    """),
    "there_was": _bank("""
        there was a {adj} {thing}|there were {count} {things} and a {thing}|a {thing} and two {adj} {things} lay
        somebody had left a {adj} {thing}|a row of {things} had been set out|there was always a {thing} of {material}
    """),
    "smell_np": _bank("a smell of {smell}|a draught that nobody could trace|the sound of {sound}|one {adj} chair"),
    "smell2": _bank("cold iron|lavender|mice|turpentine|wet dog|ash|mould|ginger|the sea|candle ends"),
    "digits2": _bank("9|11|14|16|17|19|22|26|28|33|35|38|42|50"),
    "reflection": _bank("""
        {lead} had always held that {idea}.|{idea}, as they say in {town}.
        one may suppose that {idea}; {lead} did not suppose so.
        there are people for whom {matter} is a matter of life and death, and {lead} was not one of them.
        perhaps {idea}.|it is easy, afterwards, to see that {matter} and {matter2} were the same question.
        what is a {thing}, after all, but {count} pieces of {material}?
        {person} used to say that {idea}, and {person_he} ought to have known.
        the older people of {town} still believe that {idea}.
        if anybody had asked about {matter}, the answer would have been that {idea}.
        {lead} thought of {far}, of {things}, of {matter}.
        how {other} had come to care about {matter} is more than this account can tell.
        memory is a {adj} {thing}, and {lead} trusted it no further than that.
        it would be pleasant to report that {matter} was settled {time}, but it was not.
        some questions, like {matter}, are asked only so that they may be left.
    """),
    "speech": _bank("""
        I have nothing to say about {matter}|you may tell {person} that I want my {thing} back
        there were {count} of them on {day}|nobody mends a {thing} in this weather|did you see {person} at {place}?
        what became of the {adj} {thing}?|whose {things} are these?|I paid {digits} shillings for those {things}
        it is only {weather}, it will pass by {day}|my mother kept a {thing} on just such a {surface}
        I will be at {place} by {clock}, with the {thing}|you were seen in {street} with a {adj} {thing}
        {person} never forgave us for {matter}|do not speak to me of {matter}|the {ship} is due from {far} on {day}
        we shall want {digits} {things} before {month}|if it is about {matter}, I would rather hear it from {person}
        who gave you leave to move the {things}?|I thought that you were in {far}
        take the {animal} with you when you go to {place}|it was {person} who sold me the {thing}
        I could smell {smell} from {street}|have you counted the {things}?|let us talk of something other than {matter}
        in {year} they said the same about {matter}|that {thing} is worth more than {place}
        I would sooner sell {things} in {far}|ask {person}, if you do not believe me about the {thing}
        you said the {ordinal} of {month}, and I believed you|the {adj} one, if you please, and two of the {things}
        I dreamed about {place} again|they are saying at {place} that {idea}|we had {weather} the whole way from {far}
        she left a {adj} {thing} on the {surface}|no one but {person} would put {things} on the {surface}
        what would you do with {count} {things}?|I have waited {span} for an answer about {matter}
        how should I know where {person} keeps the {thing}?|put the {things} down and listen
        I give you my word about {matter}|the key to {place} hangs behind the {thing2}
        is that {sound}, or do I imagine it?|you will find that {idea}|must we go by {street}?
        there is {weather} on the way from {far}, by the look of it|when did {person} last pay for the {things}?
        I never learned to carry a {thing} properly
    """),
    "said": _bank("""
        said {lead}|said {other}|answered {other}|said {lead}, {lead_part}|said {other} {mood}|{lead} replied
        returned {other}|put in {person}|murmured {lead}|said {person} from the doorway|{other} went on
        said {person}, who {person_rel}
    """),
    "dialogue": _bank("""
        "{Q}," {said}.|"{Q}," {said}. "{Q2}."|"{Q}." {Lead} {lead_vp}. "{Q2}."|"{Q}!" {said}.|"{Q}," {said}, "and {q2}."
        "{Q}..." {said}.|{Other} looked up from the {thing}. "{Q}," {said}.|"{Q}; {q2}," {said}.|"{Q}. {Q2}. {Q3}."
        "Well," {said}, "{q}."|"No," {said}; "{q}."|"{Q}."|"Perhaps," {said}. "{Q}, and {q2}."
        at this {other} {other_vp}. "{Q}," {said}.|"{Q}." {Lead} {lead_vp} before answering. "{Q2}."
        "{Q}," {said}, as if {person} had never mentioned {matter}.|{Lead} {lead_vp}, and {other} {other_vp}. "{Q}."
        "{Q}." {Scene}. "{Q2}." {Scene}.
    """),
    "letter_open": _bank("""
        your letter of the {ordinal} reached me {time}, by way of {far}.|I write in haste, for {scene}.
        you ask for news of {town}, and there is little.
        I have now been {span} at {place}, and must give you some account of it.
        forgive my silence, which was owing to {matter}.
        I take up my pen with no great hope that this will find you still in {far}.
        since I wrote last, {person} {person_vp}.
    """),
    "letter": _bank("""
        {person} {person_vp}.|I have bought {count} {things}, as you advised, and a {adj} {thing} besides.
        we have had {weather} since the {ordinal}.|as to {matter}, I can only say that {idea}.
        pray tell {person} that the {things} arrived, all but {count} of them, in good order.
        {person}, who {person_rel}, sends you a {thing}.
        I was at {place} on {day}, and there I saw {person}, who {person_vp}.
        do you remember the {adj} {thing} at {place}?|the cost was {digits} pounds, which I do not regret.
        they talk here of nothing but {matter}.|it is now {clock}, and I can hear {sound}.
        if you should pass through {far}, be so good as to ask after the {things}.
        my own opinion, for what it may be worth, is that {idea}.
        {person} will have it that {person2} {person_vp}, but I was there, and I saw nothing of the kind.
        I enclose {digits2} shillings for the {things}.
    """),
    "letter_close": _bank("""
        Yours ever, in spite of {matter}|With kind regards to {person}|Your affectionate {relation}|In haste, on {day}
        Yours, until {month}|With thanks for the {things}|Believe me, with regards to {person}, yours ever
        Your {relation}, in good health but for {weather}|Yours, from {place}|Your obedient {relation}, at {clock}
    """),
    "relation": _bank("cousin|friend|niece|godchild|neighbour|partner|pupil|sister-in-law|tenant|old shipmate"),
    "list_head": _bank("""
        Left at {place} on {day}|Wanted before the {ordinal} of {month}|Found in the {adj} {thing}|To be sold at {place}
        Items lent to {person}|Things to settle with {person}|For the journey to {far}
        Remaining in the cellar of {place}|Damaged in the flood of '{year2}
    """),
    "list_item": _bank("""
        {count} {things}, {adj}|one {thing} of {material}, {adj}|{digits} {things} from {far}
        a {adj} {thing}, the property of {person}|{digits2} feet of {material}, cut short|the {thing} from the {surface}
        {things} and {things2}, mixed|a {thing}, to be mended by {day}|half of the {things} promised to {person}
        the {adj} {thing}, if it can be found|a drawing of {place}, framed in {material}
    """),
    "entry": _bank("""
        paid to {person} for {digits} {things}, {digits2} shillings
        received of {person}, on account of {matter}, {digits2} pounds|{digits} {things} to {place}, carriage paid
        lent {person} one {thing}; returned {adj}|to mending a {adj} {thing}, {digits2} pence
        no trade, owing to {weather}|sold the {adj} {thing} to a gentleman from {far}
        rent of {place}, one quarter, {digits} shillings|bought at auction {count} {things} and a {thing2}
        weighed {digits} {things}, {count} short|the carrier brought {things2} in place of {things}
    """),
    "history": _bank("""
        In {year}, {person2}'s grandfather bought {place} for {digits} pounds.
        Until {year} there was no road from {place} to {place}.
        The records of {town} mention {things} as early as {year}.
        {place} burned down in {year} and was rebuilt of {material}.
        The ferry was let in {year} to a family from {far}, who kept it for {span}.
        In those days a {thing} cost {digits2} pence, and {things} were sold by weight.
        It was in {year}, during {season}, that the {ship} was lost with {digits} {things} and a {animal}.
        Of the {count} mills that stood on the river, only {place} remains.
        The bell, cast in {far}, weighs {digits} pounds and is cracked on the {ordinal} rib.
        A charter of the year {year} forbids the sale of {things} on {day}.
        The old books give the population as {digits} souls, not counting {things2}.
        A museum was proposed in {year}, and {person} {person_vp} in honour of it.
    """),
    "title": _bank("""
        The {adj} {thing}|{matter}|What {person} Saw|A Visit to {place}|{things} and {things2}|{weather}
        Concerning {matter}|The {ship}|A Letter from {far}|{day} at {place}|The {ordinal} of {month}|{place} by Night
        An Account of {matter}|In Which {person} Is Late|{season}
    """),
}  # fmt: skip

_BLOCKS = {
    "narrative": 8,
    "mixed": 4,
    "description": 4,
    "dialogue": 5,
    "letter": 2,
    "list": 1,
    "ledger": 1,
    "history": 2,
}
"""How many blocks of each kind are in the deck that a text deals from."""

_FIRST_NAMES = {
    "he": _bank("""
        Abel|Ambrose|Basil|Caleb|Conrad|Cyril|Edmund|Ezra|Felix|Gilbert|Hugo|Ivor|Jasper|Lionel|Matthias|Nathan|Oswin
        Percy|Rupert|Silas|Tobias|Walter|Wilfred|Jonas|Martin|Reuben|Leopold|Owen|Barnaby|Clement
    """),
    "she": _bank("""
        Adela|Agnes|Beatrice|Cecily|Clara|Dorothea|Edith|Esther|Flora|Harriet|Hester|Ida|Judith|Lavinia|Lydia|Mabel
        Miriam|Nora|Olive|Phoebe|Rosamund|Ruth|Sabina|Tabitha|Ursula|Winifred|Hilda|Marian|Susannah|Thea
    """),
}
_SURNAMES = _bank("""
    Ashdown|Bellweather|Birkett|Calloway|Capstick|Corrie|Dunmore|Ellery|Fairlamb|Farrow|Gaunt|Gillow|Hallam|Haskett
    Inskip|Jessop|Kettering|Lamb|Loxley|Marchbank|Mundy|Nettleton|Ormerod|Pascoe|Penhale|Quill|Raistrick|Rowntree|Sallow
    Setterby|Stanger|Tallis|Thackray|Trewin|Underhill|Varley|Wainscott|Wetherby|Whitlow|Yarrow|Oakes|Brandreth|Crane
    Dobbs|Egerton
""")
_TITLES = {"he": _bank("Mr.|Dr.|Capt.|Mr.|Rev.|Col.|Prof."), "she": _bank("Mrs.|Miss|Mrs.|Dr.|Miss|Lady")}
_TRADES = _bank("""
    chandler|schoolteacher|ferry keeper|apothecary|clockmaker|surveyor|bookbinder|corn merchant|postmistress|organist
    cooper|glazier|lighthouse keeper|printer|tailor|auctioneer|gardener|innkeeper|magistrate|saddler|veterinary surgeon
    pilot|baker
""")
_TOWN_HEADS = _bank(
    "Ash|Brack|Cold|Dun|Elder|Fen|Gar|Hal|Ink|Kes|Lang|Mar|Nor|Ot|Pen|Red|Sal|Thorn|Wex|Wither|Stan|Hol|Cal"
)
_TOWN_TAILS = _bank("ford|mouth|wick|bury|ham|combe|stead|bridge|haven|leigh|port|well|burn|minster|cross|low")
_STREETS = _bank("""
    Mill|Chandler|Bridge|Salt|Orchard|Hope|Cable|Priory|Goose|North|Well|Ropewalk|Bishop|Tanner|Lower|Fish|Weaver|Hill
    Gaol|Spring
""")
_STREET_KINDS = _bank("Street|Lane|Row|Street|Hill|Passage|Road|Terrace|Walk")
_PLACES = _bank("""
    the {inn}|the customs house|the old mill|the boatyard|the library|the assembly rooms|St. {saint}'s church
    the toll gate|{surname}'s shop|the lower quay|the schoolhouse|the brickworks|{surname} House|the market hall
    the {colour_name} farm|the signal tower|the lime kiln|the post office|the infirmary|the bandstand|the almshouses
    the salt store|the observatory|the rope walk
""")
_INNS = _bank("Three Herons|Plough|Packhorse|Blue Anchor|Fleece|Labour in Vain|Seven Stars|Old Pilot|Bird in Hand")
_SAINTS = _bank("Bride|Alban|Cuthbert|Dunstan|Olave|Giles|Werburgh|Piran|Swithin|Botolph")
_COLOURS = _bank("white|red|upper|far|new|low|stone")

_PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}
_Scope = Mapping[str, "str | Callable[[], str]"]


class _Person(NamedTuple):
    short: str
    full: str
    trade: str
    pronoun: str


class _Author:
    """Writes one text: holds its generator, its people and places, and what has been said already."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.decks: dict[str, list[str]] = {}
        self.seen: set[str] = set()
        self.last_mentioned: _Person | None = None
        pick = self.random.choice
        surnames = self.random.sample(_SURNAMES, 14)
        self.people = [self._person(surname) for surname in surnames[:10]]
        inn, saint, colour = pick(_INNS), pick(_SAINTS), pick(_COLOURS)
        places = [
            place.format(inn=inn, saint=saint, surname=surname, colour_name=colour)
            for place, surname in zip(self.random.sample(_PLACES, 11), surnames[3:], strict=True)
        ]
        streets = [f"{name} {pick(_STREET_KINDS)}" for name in self.random.sample(_STREETS, 6)]
        self.town = pick(_TOWN_HEADS) + pick(_TOWN_TAILS)
        self.banks: dict[str, tuple[str, ...]] = {
            **_GRAMMAR,
            "block": tuple(kind for kind, count in _BLOCKS.items() for _ in range(count)),
            "place": tuple(places),
            "street": tuple(streets),
            "town": (self.town,),
        }

    def _person(self, surname: str) -> _Person:
        pronoun = self.random.choice(("he", "she"))
        first, title = self.random.choice(_FIRST_NAMES[pronoun]), self.random.choice(_TITLES[pronoun])
        short = self.random.choice((f"{title} {surname}", first, f"{title} {surname}"))
        return _Person(short, f"{first} {surname}", self.random.choice(_TRADES), pronoun)

    def draw(self, name: str) -> str:
        """The next entry of a bank, dealt from a shuffled deck: none comes twice before all have come once."""
        deck = self.decks.get(name)
        if not deck:
            deck = self.decks[name] = list(self.banks[name])
            self.random.shuffle(deck)
        return deck.pop()

    def fill(self, template: str, scope: _Scope) -> str:
        """`template` with its slots filled from `scope` first, from the banks otherwise."""

        def fill_slot(match: re.Match[str]) -> str:
            value = scope[match[1]] if match[1] in scope else self.draw(match[1])
            return self.fill(value, scope) if isinstance(value, str) else value()

        return _SLOT.sub(fill_slot, template)

    def mention(self, person: _Person) -> str:
        """A pronoun where it is clear who is meant, else a name or the trade."""
        known, self.last_mentioned = self.last_mentioned is person, person
        if known and self.random.random() < 0.6:
            return person.pronoun
        return self.random.choices((person.short, person.full, f"the {person.trade}"), weights=(6, 2, 1))[0]

    def scope(self) -> _Scope:
        """Slots bound for one sentence or paragraph: `lead` and `other` act, `person` is a bystander."""
        lead, other, bystander, extra = self.random.sample(self.people, 4)
        others = [person.short for person in self.people if person not in (lead, other)]

        def own(person: _Person) -> _Scope:
            _, him, his = _PRONOUNS[person.pronoun]
            strangers = [name for name in others if name != person.short]
            return {"his": his, "him": him, "person": lambda: self.random.choice(strangers)}

        scope: dict[str, str | Callable[[], str]] = {
            "lead_full": lead.full,
            "person": bystander.short,
            "person2": extra.short,
            "person_he": bystander.pronoun,
            "his": _PRONOUNS[lead.pronoun][2],
        }
        for name, who in (("lead", lead), ("other", other), ("person", bystander)):
            if name != "person":
                scope[name] = lambda who=who: self.mention(who)  # type: ignore[misc]
            for kind in ("vp", "rel", "part"):
                scope[f"{name}_{kind}"] = lambda who=who, kind=kind: self.fill(self.draw(kind), own(who))  # type: ignore[misc]
        for name in ("q", "q2", "q3"):
            scope[name] = lambda: self.fill(self.draw("speech"), own(bystander))
        for name in ("q", "q2", "q3", "lead", "other", "scene"):
            scope[name.capitalize()] = lambda name=name: _capitalised(self.fill(f"{{{name}}}", scope))  # type: ignore[misc]
        return scope

    def sentence(self, kind: str, scope: _Scope) -> str:
        """One new sentence of `kind`, of 4 to 45 words."""
        before = self.last_mentioned
        text = ""
        for _ in range(_NUM_TRIES):
            self.last_mentioned = before
            text = _tidied(self.fill(self.draw(kind), scope))
            if text not in self.seen and _MIN_WORDS <= len(text.split()) <= _MAX_WORDS:
                break
        self.seen.add(text)
        return text

    def paragraph(self, kinds: tuple[str, ...], low: int, high: int) -> str:
        scope = self.scope()
        self.last_mentioned = None
        return " ".join(self.sentence(self.random.choice(kinds), scope) for _ in range(self.random.randint(low, high)))

    def dialogue(self) -> str:
        scope = self.scope()
        self.last_mentioned = None
        return "\n\n".join(self.sentence("dialogue", scope) for _ in range(self.random.randint(3, 8)))

    def letter(self) -> str:
        scope = self.scope()
        writer, reader = self.random.sample(self.people, 2)
        date = self.fill(f"{self.draw('place')}, {{digits2}} {{month}} {{year}}", {}).replace("the ", "The ", 1)
        body = [self.sentence("letter_open", scope)]
        body += [self.sentence("letter", self.scope()) for _ in range(self.random.randint(3, 8))]
        close = self.fill(self.draw("letter_close"), scope)
        return "\n\n".join((date, f"My dear {reader.short},", " ".join(body), f"{close},\n{writer.full}"))

    def items(self) -> str:
        head = _capitalised(self.fill(self.draw("list_head"), self.scope()))
        bullet = self.random.choice(("- ", "* ", "{}. "))
        lines = [
            bullet.format(index + 1) + self.fill(self.draw("list_item"), self.scope())
            for index in range(self.random.randint(4, 9))
        ]
        return _tidied(f"{head}:\n\n" + "\n".join(lines))

    def ledger(self) -> str:
        month, day = self.draw("month"), self.random.randint(1, 6)
        lines = []
        for _ in range(self.random.randint(4, 8)):
            entry = _capitalised(self.fill(self.draw("entry"), self.scope()))
            lines.append(f"{day} {month}. {entry}.")
            day += self.random.randint(1, 4)
        return _tidied("\n".join(lines))

    def block(self) -> str:
        match self.draw("block"):
            case "narrative":
                return self.paragraph(("narrative",), 3, 8)
            case "mixed":
                return self.paragraph(("narrative", "narrative", "reflection", "description"), 3, 7)
            case "description":
                return self.paragraph(("description",), 3, 6)
            case "dialogue":
                return self.dialogue()
            case "letter":
                return self.letter()
            case "list":
                return self.items()
            case "ledger":
                return self.ledger()
            case _:
                return self.paragraph(("history",), 2, 4)

    def heading(self, number: int) -> str:
        title = _tidied(self.fill(self.draw("title"), self.scope()))
        return f"Chapter {number}\n\n{title}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tidied(text: str) -> str:
    """A first capital, `an` before vowels, and one mark where a question met the comma or full stop of its frame."""
    text = _ARTICLE.sub(r"\1n ", text)
    text = _NEW_SENTENCE.sub(lambda match: f"? {match[1].upper()}", text)
    text = _AFTER_QUESTION.sub("?", text)
    text = _DOUBLE_STOP.sub(".", text)
    return '"' + _capitalised(text[1:]) if text.startswith('"') else _capitalised(text)


def generate_prose(num_words: int, seed: int = 0) -> str:
    """At least `num_words` words of varied English prose, the same for the same arguments.

    The text ends with a whole paragraph, letter or list, so it may be some 200 words longer than asked for.
    Paragraphs are separated by blank lines, chapters open with a heading of two paragraphs. No number has more than
    four digits, so that facts made of longer numbers cannot occur by chance. Of the
    sentences of 12,000 words, under 3% repeat another exactly.

    Raises:
        ValueError: `num_words` is negative.
    """
    if num_words < 0:
        raise ValueError(f"num_words must be at least 0, got {num_words}; ask for a positive number of words")
    author = _Author(seed)
    blocks: list[str] = []
    written, chapter, chapter_end = 0, 0, 0
    while written < num_words:
        if written >= chapter_end:
            chapter += 1
            chapter_end = written + author.random.randint(600, 1400)
            blocks.append(author.heading(chapter))
            written += len(blocks[-1].split())
        blocks.append(author.block())
        written += len(blocks[-1].split())
    return "\n\n".join(blocks)
