"""Sentences for the demo: eight questions, and seven sentences near each of them."""

QUERIES = (
    "How do I get a stubborn stain out of a cotton shirt?",
    "What causes the tides to rise and fall twice a day?",
    "Which exercises help against lower back pain from sitting too long?",
    "How can I make bread with a crisp crust at home?",
    "Why does my program run out of memory when it reads a large file?",
    "What should I look at before buying a used car?",
    "How do vaccines teach the immune system to recognise a virus?",
    "What is the best way to learn a new language as an adult?",
)

CANDIDATES = (
    # stains
    "Rub the spot with cold water and a little dish soap before it dries, then wash the shirt as usual.",
    "Red wine comes out of cotton if you cover it with salt at once and rinse it after an hour.",
    "Never put a stained garment in the dryer, because the heat sets the mark for good.",
    "A paste of baking soda and hydrogen peroxide lifts old sweat marks from white collars.",
    "Wool shrinks when it is washed hot and spun too fast.",
    "The tailor shortened the sleeves and replaced two missing buttons.",
    "Linen is cooler to wear than polyester on humid summer days.",
    # tides
    "The gravity of the Moon pulls the oceans into two bulges, and the Earth turns beneath them.",
    "High water returns about fifty minutes later each day, as the Moon moves along its orbit.",
    "When Sun and Moon stand in one line, their pull adds up and the spring tide is at its highest.",
    "In the Bay of Fundy the sea level changes by as much as sixteen metres between ebb and flood.",
    "Fishermen left the harbour shortly before dawn to catch the outgoing current.",
    "The Moon always shows us the same face, since it turns once for every revolution.",
    "Waves are driven by the wind and have little to do with the depth of the water far from shore.",
    # back pain
    "Standing up every half hour and stretching the hips takes load off the lumbar spine.",
    "Planks and bird dogs strengthen the core muscles that support the lower back.",
    "A chair that is too low tilts the pelvis backwards and rounds the back for hours.",
    "Physiotherapists recommend walking over bed rest for most people with a sore back.",
    "The marathon runner tore a calf muscle three kilometres before the finish.",
    "She keeps a skipping rope in her office drawer.",
    "Swimming is gentle on the joints, because the water carries most of the body's weight.",
    # bread
    "Bake the loaf in a very hot cast-iron pot with the lid on, so that the steam keeps the surface soft at first.",
    "A long, cold fermentation gives sourdough its flavour and helps the crust to blister and brown.",
    "Throw a few ice cubes onto the oven floor to make steam when the dough goes in.",
    "Let the bread cool on a rack, or moisture will soften the crust from below.",
    "The recipe calls for two eggs, a cup of sugar and the zest of a lemon.",
    "Durum wheat is milled into semolina for pasta.",
    "The bakery on the corner sells out of croissants before nine in the morning.",
    # memory
    "Reading the whole file into a list needs several times its size in RAM; iterate over the lines instead.",
    "Memory mapping lets the operating system load only the pages of the file that are touched.",
    "The process was killed by the kernel because it asked for more memory than the machine had left.",
    "Process the data in chunks and write each result to disk before you fetch the next one.",
    "A leak shows as resident size that grows with every request and never falls again.",
    "The compiler refuses to build the project because a header is missing.",
    "Merge sort needs additional space, while heapsort works in place.",
    # used car
    "Check the service history, look for rust under the doors and take it for a long test drive.",
    "An independent mechanic can find hidden accident damage before you pay for the vehicle.",
    "Compare the mileage with the wear of the pedals and the steering wheel.",
    "Worn tyres and an overdue timing belt are good arguments for a lower price.",
    "Electric buses have replaced the diesel fleet on two lines in the city centre.",
    "He parked the van across the street and forgot to lock it.",
    "Insurance premiums depend on the driver's age and on the region.",
    # vaccines
    "A vaccine shows the body a harmless piece of the pathogen, and memory cells keep the answer for years.",
    "Messenger RNA carries the plan of the spike protein, which our own cells then build for a few days.",
    "Antibodies bind to the surface of the virus and mark it for the white blood cells.",
    "Booster doses remind the immune system of an infection it has never actually had.",
    "Antibiotics act against bacteria and are useless against influenza.",
    "The hospital opened a second ward for premature babies.",
    "Hay fever is an exaggerated reaction of the body's defences to pollen.",
    # language
    "Half an hour of practice every day does more than a whole weekend once a month.",
    "Talking to native speakers early on trains the ear and takes away the fear of mistakes.",
    "Spaced repetition shows you each word just before you would forget it.",
    "Watching films with subtitles in the foreign language helps grown-up learners with fast speech.",
    "Children pick up an accent more easily than their parents do.",
    "The dictionary lists eleven meanings of the verb 'to run'.",
    "The museum offers guided tours in Portuguese on Thursdays.",
)
