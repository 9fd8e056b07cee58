"""What people write in captions for the 80 classes of COCO.

The policy, in the order in which it decides:

- **Precision before recall.** A mention that is missed costs one measurement; a wrong one spoils the average. A mention
  counts only where the image has a box of the class, so a word may be listed when, beside such a box, it nearly always
  means it ("remote", "bat", "mitt"), and not merely because it sometimes does.
- **Words that name several classes are left out**: board (surf, skate or snow), computer, bag, glass, light, bare
  plant, animal, fruit, vehicle, stool; so are words for groups (crowd, team, couple), pronouns, and roles that animals
  and things have as well (mother, adult, male, passenger, model).
- **COCO's own labelling is followed** where it is broader than the word: pandas are bears, stoves are ovens, mugs are
  cups, burgers are sandwiches, monitors are tvs, urinals are toilets, all tables but coffee, end, pool and work tables
  are dining tables, a teddy bear is no bear.
- **A colour, a game or a verb is no object.** "orange" counts in the plural and in "orange slice" only; "baseball",
  "football" and the like only where something is done to the thing ("hits a baseball"); "skis", "snowboards" and
  "ties" not behind a person, where they are verbs; "a bat" but not "at bat".
- **The head of a compound decides.** "tennis player" is a person, "carrot cake" a cake, "bus driver" a person, "stop
  light" a traffic light. Compounds whose head is no COCO class ("dog house", "train station", "apple pie", "pizza box",
  "clock tower") and things that only look like one ("stuffed sheep", "horse statue", "baby elephant" for the person)
  stand in `COCO_BLOCKED` and name nothing.
- A mention has the words that make the name ("dining room table", "tennis racquet"), not its adjectives.

Words in parentheses have to be there but do not belong to the mention (see `lightning_xai.data.spans.MentionFinder`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product


def _words(text: str) -> tuple[str, ...]:
    """The phrases of a text that separates them by commas and line ends."""
    return tuple(" ".join(part.split()) for part in text.split(",") if part.strip())


def _compounds(firsts: Iterable[str], seconds: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{first} {second}" for first, second in product(firsts, seconds))


# What is done to a ball; the name of a game becomes the name of a thing behind it.
_BALL_VERBS = _words("""
    hit, hits, hitting, throw, throws, throwing, thrown, catch, catches, catching, kick, kicks, kicking, pitch,
    pitches, pitching, toss, tosses, tossing, bounce, bounces, bouncing, hold, holds, holding, carry, carries,
    carrying
""")
_BALL_GAMES = ("baseball", "basketball", "football", "soccer ball", "volleyball", "softball", "rugby ball")
_SPORTS = (
    "baseball",
    "basketball",
    "football",
    "hockey",
    "polo",
    "rugby",
    "soccer",
    "softball",
    "tennis",
    "volleyball",
)

COCO_SYNONYMS: dict[str, tuple[str, ...]] = {
    "person": (
        *_words("""
            person, persons, people, someone, somebody, human being, human beings, humans, adults, man, men, woman,
            women, guy, guys, gal, gals, dude, dudes, lad, lads, gentleman, gentlemen, lady, ladies, boy, boys, girl,
            girls, child, children, kid, kids, baby boy, baby girl, toddler, toddlers, infant, infants, (a) baby,
            (the) baby, (young) baby, (little) baby, (small) baby, teenager, teenagers, teens, youngster, youngsters,
            schoolgirl, schoolgirls, schoolboy, schoolboys, schoolchildren, mom, dad, father, son, daughter, wife,
            husband, grandmother, grandma, grandfather, grandpa, brother, brothers, sister, sisters, girlfriend,
            boyfriend, bride, brides, bridesmaid, bridesmaids, groomsmen, (bride and) groom, (the) groom, player,
            players, skier, skiers, skiier, skiiers, surfer, surfers, skateboarder, skateboarders, skate boarder,
            skate boarders, snowboarder, snowboarders, snow boarder, snow boarders, skater, skaters, wind surfer, wind
            surfers, windsurfer, windsurfers, kite surfer, kite surfers, kitesurfer, kitesurfers, kite boarder, kite
            boarders, kiteboarder, kiteboarders, kite flyer, kite flyers, wakeboarder, wakeboarders, paddle boarder,
            paddle boarders, paddleboarder, paddleboarders, parasailer, parasailers, jet skier, jet skiers, boarder,
            boarders, kayaker, kayakers, rower, rowers, paddler, paddlers, swimmer, swimmers, rider, riders, horse
            rider, horse riders, horseback rider, horseback riders, horse back rider, horse back riders, jockey,
            jockeys, equestrians, cyclist, cyclists, bicyclist, bicyclists, biker, bikers, motorcyclist,
            motorcyclists, bike rider, bike riders, bicycle rider, bicycle riders, motorcycle rider, motorcycle
            riders, motorcycle racer, motorcycle racers, bull rider, bull riders, racer, racers, batter, batters,
            pitcher, pitchers, catcher, catchers, hitter, umpire, umpires, referee, referees, athlete, athletes,
            golfer, golfers, ball player, ball players, frisbee player, frisbee players, teammate, teammates,
            ballplayer, ballplayers, ball boy, ball girl, bat boy, competitor, competitors, runner, runners, jogger,
            joggers, hiker, hikers, backpacker, backpackers, back packer, back packers, soldier, soldiers, worker,
            workers, chef, chefs, waiter, waiters, waitress, waitresses, baker, bakers, bartender, barista,
            businessman, businessmen, business man, business men, businesswoman, businesswomen, cowboy, cowboys, cow
            boy, cow boys, cowgirl, cowgirls, cow girl, cow girls, fireman, firemen, fire man, fire men, firefighter,
            firefighters, policeman, policemen, police man, police men, policewoman, police officer, police officers,
            motorcycle cop, motorcycle cops, motorcycle officer, motorcycle officers, cop, cops, officer, officers,
            fisherman, fishermen, fisher man, fisher men, craftsman, workman, workmen, farmer, farmers, vendor,
            vendors, clown, clowns, monk, monks, nun, nuns, dancer, dancers, singer, musician, musicians, student,
            students, teacher, teachers, doctor, doctors, dentist, photographer, photographers, driver, drivers, bus
            driver, bus drivers, truck driver, truck drivers, taxi driver, train driver, dog walker, dog walkers, dog
            owner, dog owners, pedestrian, pedestrians, passengers, commuters, tourists, travelers, customers,
            shopper, shoppers, patrons, spectator, spectators, onlooker, onlookers, bystander, bystanders, lifeguard,
            lifeguards
        """),
        *_compounds(_SPORTS, ("player", "players")),
        *_compounds(("baseball", "softball"), ("pitcher", "pitchers", "batter", "batters", "catcher", "umpire")),
    ),
    "bicycle": _words("bicycle, bicycles, bike, bikes, mountain bike, mountain bikes, bycicle"),
    "car": _words("""
        car, cars, automobile, automobiles, sedan, sedans, suv, suvs, taxi, taxis, taxi cab, taxi cabs, taxicab,
        taxicabs, minivan, minivans, mini van, mini vans, station wagon, station wagons, jeep, jeeps, hatchback, limo,
        limousine, police car, police cars, cop car, race car, race cars, sports car, sports cars
    """),
    "motorcycle": _words("""
        motorcycle, motorcycles, motor cycle, motor cycles, motorbike, motorbikes, motor bike, motor bikes, moped,
        mopeds, motor scooter, motor scooters, dirt bike, dirt bikes, dirtbike, dirtbikes, sport bike, sport bikes,
        vespa, vespas
    """),
    "airplane": _words("""
        airplane, airplanes, air plane, air planes, aeroplane, aeroplanes, plane, planes, jet, jets, jet plane, jet
        planes, jet airplane, jet airplanes, jetliner, jetliners, jet liner, jet liners, airliner, airliners, air
        liner, air liners, aircraft, aircrafts, jumbo jet, jumbo jets, fighter jet, fighter jets, biplane, biplanes,
        bi plane, bi planes, seaplane, seaplanes, sea plane, sea planes
    """),
    "bus": _words("""
        bus, buses, busses, double decker, double deckers, double decker bus, double decker buses, school bus, school
        buses, minibus, minibuses, mini bus
    """),
    "train": _words("""
        train, trains, locomotive, locomotives, train car, train cars, train engine, train engines, steam engine,
        steam engines, steam train, steam trains, subway train, subway trains, subway car, subway cars, tram, trams,
        streetcar, streetcars, street car, street cars, monorail, freight train, freight trains, passenger train,
        passenger trains, bullet train
    """),
    "truck": _words("""
        truck, trucks, firetruck, firetrucks, fire truck, fire trucks, fire engine, fire engines, pickup, pickups,
        pickup truck, pickup trucks, pick up truck, pick up trucks, tow truck, tow trucks, dump truck, dump trucks,
        semi truck, semi trucks, lorry, lorries, tractor trailer, tractor trailers, 18 wheeler, eighteen wheeler, food
        truck, food trucks
    """),
    "boat": _words("""
        boat, boats, sailboat, sailboats, sail boat, sail boats, rowboat, rowboats, row boat, row boats, motorboat,
        motorboats, motor boat, motor boats, speedboat, speedboats, speed boat, speed boats, houseboat, houseboats,
        house boat, house boats, tugboat, tugboats, tug boat, tug boats, fishing boat, fishing boats, canoe, canoes,
        kayak, kayaks, ship, ships, cruise ship, cruise ships, yacht, yachts, ferry, ferries, ferry boat, ferry boats,
        barge, barges, dinghy, dinghies, catamaran, catamarans, swan boat, swan boats, duck boat
    """),
    "traffic light": _words("""
        traffic light, traffic lights, traffic signal, traffic signals, stop light, stop lights, stoplight,
        stoplights, trafficlight, trafficlights, traffic lamp, traffic lamps, signal light, signal lights
    """),
    "fire hydrant": _words("""
        fire hydrant, fire hydrants, hydrant, hydrants, water hydrant, water hydrants, fireplug, fire plug
    """),
    "stop sign": _words("stop sign, stop signs, stopsign, stopsigns"),
    "parking meter": _words("parking meter, parking meters"),
    "bench": _words("bench, benches, park bench, park benches"),
    "bird": _words("""
        bird, birds, birdie, birdies, duck, ducks, duckling, ducklings, goose, geese, gosling, goslings, seagull,
        seagulls, sea gull, sea gulls, gull, gulls, pigeon, pigeons, dove, doves, parrot, parrots, parakeet,
        parakeets, canary, cockatoo, cockatoos, cockatiel, cockatiels, macaw, macaws, owl, owls, swan, swans, eagle,
        eagles, hawk, hawks, crow, crows, raven, ravens, vulture, vultures, flamingo, flamingos, flamingoes, pelican,
        pelicans, penguin, penguins, ostrich, ostriches, peacock, peacocks, hen, hens, rooster, roosters, heron,
        herons, egret, egrets, stork, storks, robin, sparrow, sparrows, hummingbird, hummingbirds, humming bird,
        humming birds, woodpecker, finch, finches, blue jay, blue jays, kingfisher, magpie, blackbird, blackbirds,
        wild turkey, wild turkeys
    """),
    "cat": _words("""
        cat, cats, kitten, kittens, kitty, kitties, kitty cat, feline, felines, tabby, tabby cat, house cat
    """),
    "dog": _words("""
        dog, dogs, puppy, puppies, pup, pups, doggy, doggie, doggies, canine, poodle, poodles, bulldog, bulldogs, bull
        dog, bull dogs, beagle, beagles, dachshund, dachshunds, chihuahua, chihuahuas, terrier, terriers, retriever,
        retrievers, golden retriever, german shepherd, german shepherds, dalmatian, dalmatians, labrador, pug, pugs,
        collie, collies, corgi, corgis, rottweiler, pit bull, pit bulls, pitbull, pitbulls, pit bull dog, sheepdog,
        sheepdogs, sheep dog, sheep dogs, spaniel, spaniels, mutt, doberman
    """),
    "horse": _words("horse, horses, pony, ponies, stallion, stallions, mare, mares, colt, colts, foal, foals"),
    "sheep": _words("sheep, sheeps, lamb, lambs, ewe, ewes"),
    "cow": _words("cow, cows, cattle, calf, bull, bulls, ox, oxen, heifer, heifers"),
    "elephant": _words("elephant, elephants"),
    "bear": _words("""
        bear, bears, polar bear, polar bears, brown bear, brown bears, black bear, black bears, grizzly bear, grizzly
        bears, grizzly, panda, pandas, panda bear, panda bears, bear cub, bear cubs, polar bear cub
    """),
    "zebra": _words("zebra, zebras"),
    "giraffe": _words("giraffe, giraffes, giraffee, girafe, giraff"),
    "backpack": _words("backpack, backpacks, back pack, back packs, bookbag, bookbags, book bag, knapsack, rucksack"),
    "umbrella": _words("umbrella, umbrellas, parasol, parasols"),
    "handbag": _words("handbag, handbags, hand bag, hand bags, purse, purses, pocketbook, tote bag, tote bags"),
    "tie": _words("tie, ties, necktie, neckties, neck tie, neck ties, bow tie, bow ties, bowtie, bowties"),
    "suitcase": _words("suitcase, suitcases, suit case, suit cases, luggage, baggage"),
    "frisbee": _words("frisbee, frisbees, frisbe, frisby, frizbee, frisbie, flying disc"),
    "skis": _words("skis, snow skis"),
    "snowboard": _words("snowboard, snowboards, snow board, snow boards"),
    "sports ball": (
        *_words("""
            ball, balls, baseballs, basketballs, footballs, volleyballs, soccer ball, soccer balls, tennis ball,
            tennis balls, soccerball, golf ball, golf balls, beach ball, beach balls, volley ball, basket ball, sports
            ball, bowling ball, rugby ball
        """),
        *(f"({verb} {article}) {ball}" for verb, article, ball in product(_BALL_VERBS, ("a", "the"), _BALL_GAMES)),
    ),
    "kite": _words("kite, kites"),
    "baseball bat": _words("bat, baseball bat, baseball bats, base ball bat, ball bat"),
    "baseball glove": _words("""
        glove, baseball glove, baseball gloves, mitt, mitts, baseball mitt, baseball mitts, catcher's mitt, catchers
        mitt, catcher's glove, catchers glove, ball glove, ball mitt
    """),
    "skateboard": _words("skateboard, skateboards, skate board, skate boards"),
    "surfboard": _words("surfboard, surfboards, surf board, surf boards"),
    "tennis racket": _words("""
        tennis racket, tennis rackets, tennis racquet, tennis racquets, tennis raquet, racket, rackets, racquet,
        racquets, raquet, raquets
    """),
    "bottle": _words("bottle, bottles"),
    "wine glass": _words("""
        wine glass, wine glasses, wineglass, wineglasses, champagne glass, champagne glasses, goblet, goblets, glass
        (of wine), glasses (of wine), glass (of red wine), glasses (of red wine), glass (of white wine), glasses (of
        white wine), glass (of champagne), glasses (of champagne)
    """),
    "cup": _words("""
        cup, cups, mug, mugs, coffee cup, coffee cups, coffee mug, coffee mugs, tea cup, tea cups, teacup, teacups,
        paper cup, paper cups
    """),
    "fork": _words("fork, forks"),
    "knife": _words("knife, knives, cake knife, table knife"),
    "spoon": _words("spoon, spoons"),
    "bowl": _words("bowl, bowls, dog bowl, dog bowls, cat bowl, cat bowls, pet bowl"),
    "banana": _words("banana, bananas, bannana, bannanas"),
    "apple": _words("apple, apples"),
    "sandwich": _words("""
        sandwich, sandwiches, sandwhich, sandwhiches, sandwitch, burger, burgers, hamburger, hamburgers, cheeseburger,
        cheeseburgers, panini, hot dog sandwich, club sandwich
    """),
    "orange": _words("""
        oranges, orange slice, orange slices, orange wedge, orange wedges, orange segment, orange segments, orange
        half, orange halves, (peeled) orange, (sliced) orange, mandarin orange, tangerine, tangerines, clementine,
        clementines, mandarin oranges, navel orange, navel oranges
    """),
    "broccoli": _words("broccoli, broccolli, brocolli, brocoli, broccoli floret, broccoli florets, broccolis"),
    "carrot": _words("carrot, carrots, baby carrot, baby carrots, carrot stick, carrot sticks"),
    "hot dog": _words("""
        hot dog, hot dogs, hotdog, hotdogs, chili dog, chili dogs, chilli dog, chilli dogs, bratwurst, chilidog,
        chilidogs
    """),
    "pizza": _words("pizza, pizzas, pizza pie, pizza pies, pizza slice, pizza slices"),
    "donut": _words("donut, donuts, doughnut, doughnuts, dough nut, dough nuts, donut hole, donut holes"),
    "cake": _words("""
        cake, cakes, cupcake, cupcakes, cup cake, cup cakes, cheesecake, cheesecakes, shortcake, birthday cake,
        birthday cakes, wedding cake, wedding cakes, layer cake, chocolate cake, carrot cake, apple cake, banana cake,
        orange cake, fruit cake, hot dog cake, train cake, teddy bear cake, dog cake, cat cake, bear cake, horse cake,
        car cake
    """),
    "chair": _words("""
        chair, chairs, armchair, armchairs, arm chair, arm chairs, lawn chair, lawn chairs, rocking chair, rocking
        chairs, recliner, recliners, high chair, high chairs, highchair, highchairs, beach chair, beach chairs, dining
        chair, dining chairs, dining room chair, dining room chairs, desk chair, desk chairs, office chair, office
        chairs
    """),
    "couch": _words("couch, couches, sofa, sofas, loveseat, loveseats, love seat, love seats, settee, sofa couch"),
    "potted plant": _words("""
        potted plant, potted plants, house plant, house plants, houseplant, houseplants, pot plant, pot plants, potted
        flower, potted flowers, potted tree, potted trees, plant (in a pot), plants (in pots), flower pot, flower
        pots, flowerpot, flowerpots
    """),
    "bed": _words("bed, beds, bunk bed, bunk beds, bunkbed, bunkbeds, bed frame, canopy bed"),
    "dining table": _words("""
        table, tables, dining table, dining tables, dining room table, dining room tables, dinner table, dinner
        tables, kitchen table, kitchen tables, picnic table, picnic tables, breakfast table, restaurant table, table
        top, table tops, tabletop, dinning table, dinning room table
    """),
    "toilet": _words("""
        toilet, toilets, commode, commodes, toilet bowl, toilet bowls, urinal, urinals, toilette, toliet, toliets
    """),
    "tv": _words("""
        tv, tvs, television, televisions, tv set, tv sets, television set, television sets, tv screen, tv screens,
        television screen, television screens, flat screen tv, flat screen tvs, flat screen television, flat screen
        televisions, flatscreen tv, flatscreen television, monitor, monitors, computer monitor, computer monitors,
        monitor screen, monitor screens
    """),
    "laptop": _words("""
        laptop, laptops, lap top, lap tops, laptop computer, laptop computers, lap top computer, lap top computers,
        notebook computer, notebook computers, macbook, macbooks, mac book, macbook pro, macbook laptop, netbook,
        netbooks
    """),
    "mouse": _words("mouse, mice, computer mouse, computer mice"),
    "remote": _words("""
        remote, remotes, remote control, remote controls, remote controller, remote controllers, tv remote, tv
        remotes, tv remote control, tv remote controls, television remote, television remotes, television remote
        control, wii remote, wii remotes, wii controller, wii controllers, wiimote, wiimotes, nintendo wii controller
    """),
    "keyboard": _words("keyboard, keyboards, computer keyboard, computer keyboards, key board"),
    "cell phone": _words("""
        cell phone, cell phones, cellphone, cellphones, cellular phone, cellular phones, mobile phone, mobile phones,
        smartphone, smartphones, smart phone, smart phones, iphone, iphones, phone, phones, flip phone, flip phones
    """),
    "microwave": _words("microwave, microwaves, microwave oven, microwave ovens"),
    "oven": _words("""
        oven, ovens, stove, stoves, stove top, stove tops, stovetop, stovetops, stove top oven, stove top ovens,
        stovetop oven, stovetop ovens, stove oven, pizza oven, pizza ovens, brick oven
    """),
    "toaster": _words("toaster, toasters"),
    "sink": _words("""
        sink, sinks, bathroom sink, bathroom sinks, kitchen sink, kitchen sinks, washbasin, wash basin, wash basins,
        sink basin, sink bowl
    """),
    "refrigerator": _words("""
        refrigerator, refrigerators, fridge, fridges, refridgerator, refridgerators, refrigerator freezer,
        refridgerator freezer, mini fridge, fridge freezer
    """),
    "book": _words("""
        book, books, text book, text books, textbook, textbooks, cook book, cook books, cookbook, cookbooks, comic
        book, comic books
    """),
    "clock": _words("clock, clocks, alarm clock, alarm clocks, clock face, clock faces, grandfather clock"),
    "vase": _words("vase, vases, flower vase, flower vases, glass vase, glass vases"),
    "scissors": _words("scissors, scissor"),
    "teddy bear": _words("""
        teddy bear, teddy bears, teddybear, teddybears, teddy, teddies, stuffed bear, stuffed bears, stuffed teddy
        bear, stuffed teddy bears, stuffed teddy, stuffed toy bear, stuffed polar bear, toy bear, toy bears, plush
        bear, stuffed brown bear, stuffed white bear, stuffed panda bear
    """),
    "hair drier": _words("""
        hair drier, hair driers, hair dryer, hair dryers, hairdryer, hairdryers, hairdrier, hairdriers, blow dryer,
        blow dryers, blow drier, blow driers, blowdryer, blowdryers
    """),
    "toothbrush": _words("toothbrush, toothbrushes, tooth brush, tooth brushes"),
}

_ANIMALS = tuple(
    word
    for label in ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
    for word in COCO_SYNONYMS[label]
)
_SHORT_ANIMALS = _words("""
    animal, bird, duck, owl, eagle, parrot, chicken, cat, kitten, dog, puppy, horse, pony, sheep, lamb, cow, bull,
    elephant, bear, panda, zebra, giraffe
""")
_OTHER_ANIMALS = _words("""
    animal, animals, goat, goats, deer, monkey, monkeys, lion, lions, tiger, tigers, seal, rabbit, rabbits, chick,
    chicks, bison, camel, hippo, rhino, turtle, turtles, pig, pigs, ones, zoo
""")
_VERB_SUBJECTS = _words("""
    man, men, woman, person, guy, boy, girl, lady, child, kid, he, she, who, skier, snowboarder, skateboarder,
    someone, player
""")
_FURNITURE_FOR = _words("coffee, end, side, bedside, night, pool, ping pong, foosball, billiard, billiards, dressing")

# Phrases that contain a word from above and yet name no class of COCO.
COCO_BLOCKED: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            # Likenesses and belongings of animals.
            *_compounds(
                _SHORT_ANIMALS,
                _words("""
                    statue, statues, sculpture, sculptures, figurine, figurines, figure, figures, costume, costumes,
                    mask, suit, hat, hats, print, enclosure, exhibit, pen, pens, cage, cages, house, houses, food,
                    show, toy, toys, head, heads, decoration, decorations, painting, poster, pattern, barn, farm,
                    park, shelter, skin, pasture, dung, poop, habitat, balloon, topper, design, logo, picture, doll,
                    puppet
                """),
            ),
            *_compounds(
                ("stuffed", "toy", "plush", "plastic", "ceramic", "rubber", "wooden", "fake", "cartoon", "carousel"),
                [animal for animal in _SHORT_ANIMALS if animal != "bear"],
            ),
            *_compounds(
                ("stuffed", "toy", "plush", "plastic", "ceramic", "rubber", "wooden", "fake", "cartoon"),
                _words("birds, ducks, cats, dogs, horses, cows, elephants, pandas, zebras, giraffes, lambs"),
            ),
            *(
                f"({likeness} of {article}) {thing}"
                for likeness, article, thing in product(
                    ("statue", "statues", "sculpture", "figurine", "painting", "drawing", "shape", "face"),
                    ("a", "an", "the"),
                    (
                        *_SHORT_ANIMALS,
                        "teddy bear",
                        "man",
                        "woman",
                        "person",
                        "boy",
                        "girl",
                        "child",
                        "cowboy",
                        "soldier",
                    ),
                )
            ),
            *_words("""
                ceramic bear, plastic bear, wooden bear, fake bear, carousel bear, gummy bear, gummy bears, care bear,
                care bears, koala bear, koala bears, red panda, red pandas, chicago bears, bear rug, bear hug, bear
                (umbrella), teddy bear (umbrella), teddy bear (cake), teddy bear (costume), teddy bear (picnic), bear
                claw, bear claws, bird bath, bird baths, bird feeder, bird feeders, bird nest, bird nests, bird's
                nest, birds nest, bird seed, bird's eye view, birds eye view, bird eye view, bird of paradise, angry
                bird, angry birds, bird cage, bird feathers, rubber ducky, rubber duckie, duck tape, duck pond, duck
                sauce, roast duck, roasted duck, crow's nest, crows nest, cooked goose, eagle scout, cat bed, cat
                tree, cat tower, cat nap, cat walk, cat litter, kitty litter, cat door, cat carrier, cat perch, cat
                treats, cat dish, cat eye, cat eyes, cat scratcher, cat tail, cat tails, cat fish, hello kitty, cat
                condo, dog bed, dog beds, dog leash, dog collar, dog bone, dog treat, dog treats, dog biscuit, dog
                biscuits, dog crate, dog crates, dog kennel, dog tag, dog tags, dog sled, dog door, dog carrier, dog
                dish, dog race, dog track, dog ear, dog ears, prairie dog, prairie dogs, corn dog, corn dogs, hot dog
                stand, hot dog stands, hot dog cart, hot dog vendor, hot dog truck, hot dog bun, hot dog buns, hot dog
                eating, hotdog stand, hotdog cart, hotdog bun, hotdog buns, hot dog shop, hot dog restaurant, hot dog
                costume, hot dog toppings, puppy love, horse drawn, horse back, horse carriage, horse carriages, horse
                buggy, horse cart, horse track, horse race, horse races, horse trailer, horse trailers, horse stable,
                horse stables, horse stall, horse trail, horse shoe, horse shoes, horse saddle, horse rink, saw horse,
                saw horses, rocking horse, rocking horses, sea horse, hobby horse, hobby horses, carousel horses,
                horse competition, horse event, pony tail, pony tails, pony ride, sheep skin, sheep herder, sheep
                shearing, lamb chop, lamb chops, roast lamb, leg of lamb, cow bell, cow bells, cow print, cow hide,
                cow pattern, cow skull, cow poke, cowboy hat, cowboy hats, cowboy boots, cowboy boot, cowboy outfit,
                cowboy costume, cowboy suit, bull ring, bull horn, bull fight, bull riding, bull fighting, bull's eye,
                bulls eye, red bull, chicago bulls, (his) calf, (her) calf, (left) calf, (right) calf, elephant trunk,
                elephant trunks, elephant tusk, elephant tusks, elephant ear, elephant ears, elephant ride, elephant
                rides, zebra crossing, zebra crossings, zebra stripe, zebra stripes, zebra striped, zebra rug, mickey
                mouse, minnie mouse
            """),
            # The young of animals, and what belongs to a baby.
            *(f"baby ({animal})" for animal in (*_ANIMALS, *_OTHER_ANIMALS)),
            *(
                f"baby ({word})"
                for word in _words("""
                    brown, white, black, grey, gray, and mother, polar, wild, teddy, blue, pink, bottle, bottles, bed,
                    chair, monitor, broccoli
                """)
            ),
            *_words("""
                baby stroller, baby strollers, baby carriage, baby crib, baby food, baby doll, baby dolls, baby seat,
                baby carrier, baby shower, baby toys, baby toy, baby room, baby clothes, baby gate, baby grand, baby
                powder, baby spinach, baby corn, baby bath, baby pool, baby buggy, baby shoes
            """),
            # People in name only, rooms and things made for them.
            *_compounds(
                _words("""
                    man's, men's, mens, men, woman's, women's, womens, women, boy's, boys, girl's, girls, kid's, kids,
                    child's, children's, childrens, ladies, lady's, people's, person's
                """),
                _words("room, rooms, bedroom, bathroom, restroom, rest room, toilet, washroom, tennis, soccer"),
            ),
            *_words("""
                snow man, snow men, gingerbread man, gingerbread men, lego man, lego men, stick man, stick men, stick
                figure, iron man, super man, man made, man hole, man cave, man hole cover, kid sized, children's
                (book), children's (books), child's (book), kid size, child sized, child size, people mover, people
                movers, lady bug, lady bugs, guy wire, video player, dvd player, dvd players, cd player, cd players,
                mp3 player, mp3 players, record player, record players, music player, media player, tape player,
                cassette player, disc player, audio player, blu ray player, vcr player, game player, stereo player,
                keyboard player, pitcher (of), pitchers (of), water pitcher, water pitchers, glass pitcher, milk
                pitcher, beer pitcher, tea pitcher, coffee pitcher, metal pitcher, ceramic pitcher, white pitcher,
                blue pitcher, pitcher's mound, pitchers mound, pitcher mound, pitchers plate, cake batter, pancake
                batter, cookie batter, batter's box, batters box, batter box, dream catcher, dream catchers, table
                runner, driver's seat, drivers seat, driver seat, driver side, driver's side, drivers side, driver's
                license, drivers license, screw driver, screw drivers, farmer's market, farmers market, farmer market,
                farmers markets, vendor stand, vendor stands, vendor cart, vendor carts, vendor stall, vendor booth,
                lifeguard stand, lifeguard tower, lifeguard (chair), lifeguard station, fireman's hat, doctor's
                office, doctors office, dentist office, dentist's office, chef hat, chef's hat, chefs hat, chef salad,
                chef (knife), chef's (knife), student center, (to) groom, baker's rack, bakers rack, clown fish, clown
                nose
            """),
            # Vehicles and the places made for them.
            *_compounds(
                ("bus", "train", "railway", "truck", "boat", "ship", "car", "taxi", "bike", "bicycle", "motorcycle"),
                _words("""
                    station, stations, stop, terminal, terminals, depot, depots, shelter, shelters, lane, lanes,
                    platform, platforms, line, lines, route, sign, signs, yard, yards, bridge, path, paths, trail,
                    trails, rack, racks, shop, shops, store, show, race, rally, parade, ride, tour, window, windows,
                    door, doors, seat, seats, mirror, mirrors, hood, tire, tires, wheel, wheels, helmet, helmets,
                    gear, jacket, parking, park, lot, lots, wash, garage, dealership, museum, dock, ramp, house, slip,
                    harbor, marina, trailer, launch, deck, shed, club, trip, schedule, ticket, exhibit, horn, tunnel,
                    model, light, lights, tower, trick, tricks, courier, messenger, lock, pump, basket, pedal, handle,
                    handlebars, mechanic, load, conductor, whistle, set, headlights, event, key, keys, building
                """),
            ),
            *_words("""
                train track, train engineer, boat engine, car engine, truck engine, train crossing sign, bike riding,
                train tracks, train rail, train rails, train table, wedding train, truck bed, truck beds, truck cab,
                truck stop, hand truck, hand trucks, toy truck, toy trucks, toy car, toy cars, toy train, toy trains,
                toy bus, toy boat, toy boats, toy plane, toy planes, toy airplane, toy airplanes, model train, model
                trains, model plane, model planes, model airplane, model airplanes, model car, model cars, model ship,
                model boat, paper airplane, paper airplanes, paper plane, paper boat, remote control (car), remote
                control (plane), remote control (airplane), remote control (truck), remote control (boat), remote
                control (helicopter), remote controlled, cable car, cable cars, box car, box cars, rail car, rail
                cars, railroad car, railroad cars, railway car, railway cars, passenger car, passenger cars, dining
                car, freight car, freight cars, bumper car, bumper cars, tank car, gravy boat, gravy boats, banana
                boat, banana boats, boat oar, boat oars, boat paddle, air ship, space ship, space ships, rocket ship,
                rocket ships, space shuttle, jet ski, jet skis, jet skiing, jet engine, jet engines, jet stream, jet
                trail, jet trails, jet bridge, jet bridges, jet way, jet ways, jet black, jet fuel, water jet, water
                jets, aircraft carrier, aircraft carriers, plane ticket, plane tickets, plane window, plane wing,
                plane wings, plane hangar, plane seat, plane trip, plane engine, airplane hangar, airplane hanger,
                airplane wing, airplane wings, airplane seat, airplane seats, airplane cabin, airplane window,
                airplane engine, airplane runway, airplane terminal, airplane museum, airplane meal, airplane food,
                airplane show, airplane cockpit, airplane propeller, aircraft hangar, aircraft engine, aircraft wing,
                aircraft cockpit, motorcycle police, police bike, exercise bike, exercise bikes, stationary bike,
                motor home, motor homes
            """),
            # Street furniture, sport.
            *_words("""
                bench press, work bench, bench seat, bench seats, stop sign pole, hydrant cover, umbrella stand,
                umbrella hat, umbrella holder, umbrella pole, umbrella base, umbrella handle, tie dye, tie dyed, tie
                dies, tie rack, zip tie, zip ties, twist tie, twist ties, railroad ties, railroad tie, train ties,
                (to) tie, ties (up), tie (up), ties (his), ties (her), ties (a), tie (his), tie (her), tie clip, tie
                pin, tie shop, tie tack, luggage tag, luggage tags, luggage cart, luggage carts, luggage carousel,
                luggage carrier, luggage rack, luggage racks, luggage claim, luggage area, luggage belt, luggage
                trolley, luggage compartment, luggage bin, luggage conveyor, baggage tag, baggage tags, baggage cart,
                baggage carts, baggage carousel, baggage claim, baggage area, baggage handler, baggage handlers,
                baggage trolley, baggage truck, suitcase handle, purse strap, purse dog, frisbee golf, frisbee game,
                frisbee games, frisbee team, frisbee tournament, frisbee match, frisbee field, frisbee competition,
                frisbee contest, water ski, water skis, kite board, kite boards, kite string, kite strings, kite
                festival, kite festivals, kite show, kite tail, kite tails, kite boarding, kite surfing, kite sail,
                kite surf, kite skiing, at bat, (to) bat, cricket bat, cricket bats, bat mobile, fruit bat, bat man,
                bat wings, boxing glove, oven glove, batting glove, rubber glove, winter glove, glove box, glove
                compartment, latex glove, golf glove, oven mitt, oven mitts, kitchen mitt, kitchen mitts, skateboard
                park, skateboard parks, skateboard ramp, skateboard ramps, skateboard trick, skateboard tricks,
                skateboard jump, skateboard jumps, skateboard bowl, skateboard rink, skateboard competition,
                skateboard contest, skateboard area, skateboard course, skateboard shop, skate board park, skate board
                ramp, skate board trick, skate board tricks, snowboard ramp, snowboard trick, snowboard tricks,
                snowboard jump, snowboard jumps, snowboard competition, snowboard slope, snowboard boots, snowboard
                gear, snowboard race, snowboard course, snowboard lift, (to) snowboard, (to) skateboard, surfboard
                rack, surfboard shop, surf board shop, surfboard rental, surf board rental, badminton racket,
                badminton rackets, badminton racquet, ping pong racket, ping pong rackets, racquet ball, racket ball,
                squash racket, racket sport, ball game, ball games, ball field, ball fields, ball park, ball parks,
                ball court, ball cap, ball caps, ball hat, ball gown, ball gowns, ball room, ball team, ball diamond,
                ball pit, ball machine, ball uniform, meat ball, meat balls, christmas ball, christmas balls, disco
                ball, disco balls, cheese balls, cheese ball, ball of, balls of, snow ball, snow balls, cotton balls,
                crystal ball, glass balls, rice balls, rice ball, dough balls, melon balls, exercise ball, yoga ball,
                hair ball, matzo balls, tennis ball machine, tennis ball boy, golf ball boy, ball pen, ball point,
                wrecking ball
            """),
            *(
                f"({subject}) {verb}"
                for subject, verb in product(
                    _VERB_SUBJECTS,
                    _words("""
                        skis, snowboards, skateboards, ties, bats, boats, bikes, trains, bowls, books, parks, planes
                    """),
                )
            ),
            *_compounds(
                ("baseball",),
                _words("""
                    game, games, field, fields, diamond, cap, caps, hat, hats, uniform, uniforms, team, teams,
                    stadium, park, match, practice, jersey, jerseys, pitch, mound, helmet, gear, swing, equipment,
                    card, cards, outfit, league, plate, base, fan, fans, event, dugout, coach, catch
                """),
            ),
            # The kitchen.
            *_words("""
                bottle opener, bottle openers, bottle cap, bottle caps, bottle rack, bottle holder, bottle cooler,
                wine glass rack, wine glass holder, world cup, cup holder, cup holders, cup board, cup boards,
                measuring cup, measuring cups, suction cup, suction cups, cup cake (pan), cup cake (holder), coffee
                cup lid, mug shot, mug rack, fork lift, fork lifts, fork (in the road), tuning fork, pitch fork, fork
                (in the path), knife block, knife blocks, knife holder, knife set, knife rack, knife sharpener, spoon
                rest, spoon holder, cement bowl, concrete bowl, skate bowl, skating bowl, skatepark bowl, skate park
                bowl, fish bowl, fish bowls, super bowl, bowl cut, rose bowl, bowl (of a skate), bowl (of a
                skatepark), sink bowls, banana bread, banana split, banana splits, banana pudding, banana tree, banana
                trees, banana peel, banana peels, banana leaf, banana leaves, banana plant, banana plants, banana
                plantation, banana muffin, banana muffins, banana pepper, banana peppers, banana cream pie, banana
                smoothie, banana shake, banana costume, banana sticker, banana stand, banana chips, apple computers,
                apple logo, apple (laptop), apple (laptops), apple (computer), apple (monitor), apple (keyboard),
                apple (mouse), apple (phone), apple (iphone), apple (macbook), apple (remote), apple (tv), apple
                (tvs), apple store, apple product, apple products, apple pie, apple pies, apple juice, apple cider,
                apple sauce, apple tree, apple trees, apple device, apple brand, apple orchard, apple core, apple
                crisp, apple cart, apple tart, apple turnover, apple butter, apple cobbler, big apple, apple desktop,
                apple strudel, pine apple, pine apples, sandwich shop, sandwich board, sandwich bag, sandwich bags,
                sandwich maker, sandwich bar, sandwich press, sandwich place, ice cream sandwich, ice cream
                sandwiches, burger king, hamburger bun, hamburger buns, hamburger meat, hamburger stand, burger bun,
                burger joint, burger patty, burger restaurant, carrot top, carrot tops, carrot juice, carrot soup,
                carrot peelings, carrot salad, carrot nose, broccoli soup, broccoli salad, broccoli plant, broccoli
                plants, broccoli casserole, broccoli quiche, pizza box, pizza boxes, pizza cutter, pizza cutters,
                pizza crust, pizza crusts, pizza dough, pizza sauce, pizza pan, pizza pans, pizza stone, pizza tray,
                pizza peel, pizza plate, pizza shop, pizza place, pizza parlor, pizza restaurant, pizza hut, pizza
                maker, pizza chef, pizza delivery, pizza party, pizza toppings, pizza kitchen, pizza sign, pizza
                bread, pizza rolls, pizza truck, pizza store, pizza sticks, pizza buffet, pizza bagel, pizza paddle,
                pizza roller, pizza wheel, donut shop, donut shops, donut store, donut box, donut display, donut
                factory, donut machine, donut maker, donut stand, doughnut shop, doughnut store, doughnut box,
                doughnut machine, doughnut factory, doughnut making, donut making, doughnut display, donut case,
                doughnut case, doughnut stand, cake stand, cake stands, cake pan, cake pans, cake plate, cake plates,
                cake topper, cake toppers, cake server, cake cutter, cake shop, cake mix, cake decorations, cake
                decorating, cake box, cake tray, cake display, cake batter, cake cover, cake dish, cake icing, cake
                crumbs, cupcake holder, cupcake stand, cupcake pan, cupcake tin, cupcake liners, cupcake wrapper, crab
                cake, crab cakes, fish cake, fish cakes, rice cake, rice cakes, pan cake, pan cakes, funnel cake,
                urinal cake, wedding cake topper, birthday cake candles, orange juice, orange peel, orange peels,
                orange tree, orange trees, orange sauce
            """),
            # The house.
            *_compounds(_FURNITURE_FOR, ("table", "tables")),
            *_words("""
                table tennis, changing table, operating table, examination table, exam table, examining table, massage
                table, work table, work tables, computer table, vanity table, console table, drafting table, train
                table, sewing table, air hockey table, massage tables, water table, tv table, table cloth, table
                cloths, table lamp, table lamps, table setting, table settings, table leg, table legs, table saw,
                table mat, table mats, table ware, table cover, table covering, table linen, table linens, table
                decorations, table decoration, table centerpiece, table runner, table runners, table spoon, table
                spoons, table height, table edge, tabletop game, time table, turn table, bed room, bed rooms, flower
                bed, flower beds, garden bed, river bed, bed (of), beds (of), bed spread, bed spreads, bed sheet, bed
                sheets, bed side, bed head, bed post, bed posts, bed linen, bed linens, bed cover, bed covers, bed
                skirt, bed stand, bed pan, bed table, bed tray, bed time, bed board, bed set, bed covering, bed
                coverings, bed clothes, bed bug, bed bugs, bed and breakfast, pet bed, pet beds, sofa bed, sofa beds,
                couch bed, hide a bed, tanning bed, bed pillow, bed pillows, bed spring, chair lift, chair lifts,
                wheel chair, wheel chairs, chair cushion, chair cushions, chair leg, chair legs, chair rail, chair
                back, chair cover, chair covers, chair arm, chair seat, couch cushion, couch cushions, couch pillow,
                couch pillows, couch arm, couch cover, couch potato, sofa chair, sofa chairs, sofa cushion, sofa
                cushions, sofa pillow, sofa table, sofa set, toilet paper, toilet papers, toilet paper roll, toilet
                paper rolls, toilet paper holder, toilet paper dispenser, toilet roll, toilet rolls, toilet tissue,
                toilet brush, toilet brushes, toilet seat, toilet seats, toilette seat, toilet seat cover, toilet seat
                lid, toilet lid, toilet lids, toilet tank, toilet tanks, toilet room, toilet rooms, toilet stall,
                toilet stalls, toilet cleaner, toilet cover, toilet area, toilet facilities, toilet facility, toilet
                handle, toilet plunger, toilet water, toilet bowl brush, toilet bowl cleaner, toilet training, toilet
                humor, toilet sign, toilet cubicle, toilet base, toilet tissue holder, tv stand, tv stands, tv show,
                tv shows, tv tray, tv trays, tv cabinet, tv console, tv dinner, tv dinners, tv tower, tv station, tv
                camera, tv cameras, tv crew, tv game, tv guide, tv program, tv channel, tv room, tv antenna, tv cart,
                tv controller, tv commercial, tv series, tv news, tv unit, tv shelf, television stand, television
                show, television shows, television camera, television cameras, television program, television cabinet,
                television crew, television tower, television station, television console, television series,
                television news, heart monitor, baby monitors, monitor stand, monitor lizard, laptop bag, laptop bags,
                laptop case, laptop cases, laptop sleeve, laptop stand, laptop desk, laptop screen, laptop keyboard,
                laptop keyboards, laptop screens, laptop table, laptop charger, laptop cover, laptop monitor, laptop
                mouse pad, laptop cord, mouse pad, mouse pads, mouse mat, mouse trap, toy mouse, stuffed mouse, mouse
                button, mouse ears, field mouse, mouse cursor, mouse hole, remote area, remote areas, remote location,
                remote locations, remote place, remote part, remote field, remote road, remote beach, remote island,
                remote region, remote village, remote setting, remote spot, remote landscape, remote forest, remote
                mountain, remote desert, remote site, remote country, keyboard tray, keyboard stand, keyboard keys,
                keyboard key, piano keyboard, electric keyboard, electronic keyboard, musical keyboard, music
                keyboard, keyboard instrument, phone keyboard, phone booth, phone booths, phone book, phone books,
                phone number, phone numbers, phone pole, phone poles, phone line, phone lines, phone charger, phone
                case, phone cord, phone jack, phone handset, phone handsets, phone call, phone calls, phone camera,
                phone stand, phone screen, phone box, phone boxes, pay phone, pay phones, desk phone, desk phones,
                office phone, home phone, landline phone, land line phone, corded phone, cordless phone, cordless
                phones, rotary phone, wall phone, house phone, public phone, phone conversation, phone wires, phone
                wire, phone tower, cell phone tower, cell phone case, cell phone charger, cell phone cover, cell phone
                camera, cell phone store, cell phone screen, cell phone picture, microwave cart, microwave stand,
                microwave dinner, microwave door, microwave shelf, microwave meal, toaster oven, toaster ovens, oven
                door, oven doors, oven rack, oven racks, oven hood, oven hoods, oven light, oven handle, oven timer,
                oven window, oven pan, oven range hood, dutch oven, dutch ovens, stove hood, stove vent, stove burner,
                stove burners, stove pipe, stove knobs, wood stove, wood burning stove, pot belly stove, camp stove,
                toaster pastry, toaster strudel, toaster pastries, sink cabinet, sink cabinets, sink faucet, sink
                faucets, sink counter, sink counters, sink drain, sink area, sink top, sink vanity, sink handle, sink
                handles, sink stopper, sink hole, sink countertop, refrigerator door, refrigerator doors, refrigerator
                magnet, refrigerator magnets, refrigerator shelf, refrigerator shelves, refrigerator drawer,
                refrigerator truck, fridge door, fridge doors, fridge magnet, fridge magnets, fridge shelf, fridge
                shelves, fridge drawer, book case, book cases, book shelf, book shelves, book shelve, book store, book
                stores, book cover, book covers, book page, book pages, book end, book ends, book bags, book rack,
                book stand, book mark, book light, book fair, book shop, book club, book holder, note book, note
                books, check book, face book, clock tower, clock towers, clock hand, clock hands, clock radio, clock
                radios, o clock, clock work, clock shop, clock museum, clock steeple, clock maker, vase shop, scissor
                lift, scissor kick, toothbrush head, toothbrush heads, toothbrush holder, toothbrush holders, tooth
                brush holder, toothbrush case, toothbrush container, toothbrush rack, flower pot holder
            """),
        )
    )
)
