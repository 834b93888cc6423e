-- ARGV: 5 when the caller looked last and 6 before when it judges nobody, both by our clock.
-- Answers {now, no judgement before, when to look again or '', more to reap?, dead ones that could not be reaped}.
if not open() then return {ms(now), '0', '', 0, {}} end
local before = safe
seen, safe = math.max(seen, tonumber(ARGV[5])), math.max(safe, tonumber(ARGV[6]))
-- Whether we may write. Where the store is full nobody can renew, so nobody is judged until there was time for that.
local function note(...)
  local wrote = redis.pcall('HSET', R, ...)
  if type(wrote) == 'table' and string.find(wrote.err or '', 'OOM', 1, true) then safe = now + long end
  return type(wrote) == 'number'
end

local writable = true
if look() or safe ~= before then writable = note('~seen', ms(now), '~safe', ms(safe)) end
local over = dead(200)
if writable and #over > 0 then
  writable = note('~seen', ms(now))
  over = dead(200)
end
local more = writable and #over == 200 and 1 or 0
if writable then
  reap(over)
  done()
  over = {}
elseif #over == 200 then
  over = dead(5000)
end
local nearest = redis.call('ZRANGEBYSCORE', X, '(' .. ms(now), '(+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local due = now + gap / 2
if nearest[2] then due = math.min(due, math.max(tonumber(nearest[2]), safe)) end
if now < safe then due = math.min(due, safe) end
return {ms(now), ms(safe), ms(due), more, over}
