-- ARGV: 5 when the caller looked last and 6 before when it judges nobody, both by our clock.
-- Answers {now, no judgement before, when to look again or false, more to reap?, dead ones that could not be reaped}.
if not open() then return {now, 0, false, 0, {}} end
local known, before = seen, safe
seen, safe = math.max(seen, tonumber(ARGV[5])), math.max(safe, tonumber(ARGV[6]))
-- Whether we may write. If nobody may, as where the store is full or has too few replicas, then nobody can renew, and
-- nobody is judged until there was time for that.
local function mark(...)
  local wrote = redis.pcall('HSET', R, ...)
  if type(wrote) == 'number' then return true end
  local function is(word) return string.find(wrote.err or '', word, 1, true) end
  if is('READONLY') then
    -- A copy, which may have been cut off: at its primary, others have to have looked.
    seen, safe = known, before
    look()
  elseif not (is('NOPERM') or is('ACL failure') or is('user executing the script')) then safe = now + long end
  return false
end

local writable = true
if look() or safe ~= before then
  writable = mark('~seen', now, '~safe', safe)
  -- Who puts relies on those who looked lately.
  if writable then keep() end
end
-- When they expire was lost: see `heal`.
if writable and #redis.call('ZRANGEBYSCORE', X, '+inf', '+inf', 'LIMIT', 0, 1) == 0 then
  writable = mark('~seen', now)
  if writable then
    heal()
    keep()
  end
end
local over = dead(200)
if writable and #over > 0 then
  writable = mark('~seen', now)
  over = dead(200)
end
local more = writable and #over == 200 and 1 or 0
if writable then
  reap(over)
  tell()
  over = {}
elseif #over == 200 then
  over = dead(10000)
end
local nearest = redis.call('ZRANGEBYSCORE', X, '(' .. now, '(+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local due = now + gap / 2
if nearest[2] then due = math.min(due, math.max(tonumber(nearest[2]), safe)) end
if now < safe then due = math.min(due, safe) end
return {now, safe, math.ceil(due), more, over}
